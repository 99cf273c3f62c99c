"""Pictures of every kind to tiles, and what is refused."""

import base64
import io
import random
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from llama.errors import PromptError
from llama.vision import images
from llama.vision.images import best_canvas, fitted_size, open_image, tile_image
from tests.support.vision import picture


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    image.save(out := io.BytesIO(), form, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def metas_transform():
    """Meta's transform for tiles of this size."""
    from tests.support import meta_vision

    return meta_vision.model.VariableSizeImageTransform


@pytest.mark.parametrize(
    "size",
    [(560, 560), (561, 561), (1, 1), (3000, 2), (2, 3000), (640, 480), (480, 640), (1121, 1120), (200, 900)],
)
def test_pixels_are_metas_to_the_bit(metas_transform, size):
    if size in {(3000, 2), (2, 3000)}:  # which Meta's code makes 0 pixels wide, and fails
        assert min(fitted_size(*size, 2240, 560, 560)) == 1
    image = picture(*size)
    pixels, (rows, columns) = metas_transform(560)(image, 4)
    tiled = tile_image(image)
    assert (tiled.rows, tiled.columns) == (rows, columns)
    assert torch.equal(tiled.normalized(), pixels)


@pytest.mark.parametrize("tile", [448, 560])
def test_canvases_and_sizes_are_metas(metas_transform, tile):
    draw = random.Random(0)
    transform = metas_transform(tile)
    resolutions = torch.tensor(transform.find_supported_resolutions(4, tile))
    for _ in range(2000):
        size = draw.randint(1, 3000), draw.randint(1, 3000)
        expected = transform.get_best_fit(size, resolutions)
        rows, columns = best_canvas(*size, tile, 4)
        assert (columns * tile, rows * tile) == expected, size
        limits = [min(max(side, tile), most) for side, most in zip(size, expected, strict=True)]
        fitted = transform.get_max_res_without_distortion(size, limits)
        assert fitted_size(*size, *expected, tile) == tuple(max(1, side) for side in fitted), size


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_a_programs_defaults_change_nothing(dtype):
    """Neither a dtype, nor a device. In bfloat16, Meta's code chooses one tile for the first of these."""
    sizes = [(561, 561), (1121, 1120), (999, 700), (1680, 561)]
    expected = [tile_image(picture(*size)) for size in sizes]
    assert (expected[0].rows, expected[0].columns) == (2, 2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = [tile_image(picture(*size)) for size in sizes]
            pixels = [image.normalized() for image in found]
    finally:
        torch.set_default_dtype(before)
    assert [image.key for image in found] == [image.key for image in expected]
    assert all(torch.equal(a, image.normalized()) for a, image in zip(pixels, expected, strict=True))


def test_a_picture_may_come_in_many_forms(tmp_path):
    image = picture(60, 40)
    data = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    keys = {tile_image(source, 56).key for source in (image, data, path, str(path), url)}
    assert len(keys) == 1
    assert tile_image(picture(60, 40, seed=1), 56).key not in keys


# What undoes what the camera did, by EXIF orientation.
CAMERA = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
CAMERA |= {5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_a_photograph_is_turned_upright(form):
    image = picture(60, 40)
    for orientation, turn in CAMERA.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        taken = image.transpose(Image.Transpose[turn]) if turn else image
        found = open_image(encoded(taken, form, exif=exif, **{"lossless": True} if form == "WEBP" else {}))
        assert found.tobytes() == image.tobytes(), orientation


def test_broken_exif_data_spoils_no_picture():
    """The orientation tells that the camera stood on its head; the resolution, a fraction, is text."""
    entries = b"\x01\x12\0\x03\0\0\0\x01\0\x03\0\0", b"\x01\x1a\0\x02\0\0\0\x02a\0\0\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + b"".join(entries) + b"\0\0\0\0"
    image = picture(60, 40)
    upright = open_image(encoded(image, "JPEG")).transpose(Image.Transpose.ROTATE_180)
    assert open_image(encoded(image, "JPEG", exif=exif)).tobytes() == upright.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "PA", "RGBA"])
def test_all_usual_kinds_become_rgb(mode):
    assert open_image(picture(60, 40).convert("RGBA").convert(mode)).mode == "RGB"


def test_transparent_parts_are_white():
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(half).getpixel((0, 0)) == (127, 127, 127)
    assert open_image(encoded(Image.new("L", (8, 8)), transparency=0)).getpixel((0, 0)) == (255,) * 3


def bomb() -> bytes:
    """A PNG of 100,000 × 100,000 pixels, of which only the header is there."""
    small = bytearray(encoded(Image.new("L", (8, 8))))
    small[16:24] = (100_000).to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(small[12:29]).to_bytes(4, "big")
    return bytes(small)


def bright() -> bytes:
    """A TIFF file whose palette has numbers of 32 bits, which should have 16."""
    data = encoded(picture(60, 40).convert("P"), "TIFF")
    return data.replace(b"\x40\x01\x03\0", b"\x40\x01\x04\0")


REFUSED = {
    "no image": (b"hello", "cannot be opened, it is not one of PNG"),
    "empty": (b"", "cannot be opened"),
    "truncated": (encoded(picture(60, 40))[:2000], "cannot be decoded and may be damaged"),
    "truncated JPEG": (encoded(picture(60, 40), "JPEG")[:-500], "cannot be decoded and may be damaged"),
    "too bright": (bright(), "cannot be decoded and may be damaged"),
    "a bomb": (bomb(), "pixels; scale it down"),
    "another format": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not one of PNG"),
    "16 bits": (Image.fromarray(np.zeros((8, 8), np.uint16)), "mode 'I;16'; convert it to 8-bit RGB"),
    "floats": (Image.new("F", (8, 8)), "mode 'F'; convert"),
    "a web page": ("https://example.com/a.png", "images are not downloaded"),
    "no pixels": (Image.new("RGB", (0, 5)), "has no pixels: its size is 0 × 5"),
    "a list": ([1, 2], "not a list"),
    "None": (None, "not None"),
    "text URL": ("data:text/html;base64,AAAA", "must begin with data:image/TYPE;base64"),
    "not base64": ("data:image/png;base64,A*A", "not valid base64"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_refused_with_a_sentence(kind):
    source, sentence = REFUSED[kind]
    with pytest.raises(PromptError, match=sentence):
        open_image(source)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image file .*a\.png"):
        open_image(tmp_path / "a.png")


def test_bytes_are_counted_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    data = encoded(picture(60, 40))
    (tmp_path / "a.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, tmp_path / "a.png", url):
        with pytest.raises(PromptError, match=r"bytes; at most 1,000 are accepted"):
            open_image(source)


def test_pixels_are_counted_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(PromptError, match="60 × 40 pixels; scale it down to at most 1,000"):
        open_image(encoded(picture(60, 40)))
