"""Images: from any source to the tiles that a vision model reads.

Only Pillow is needed. Input is untrusted: only listed formats are accepted, and bytes and pixels are
counted before anything is decoded.

An image is rotated according to its EXIF orientation. Transparent parts become white, as in
`transformers`; Meta's code drops the alpha channel and shows the color stored beneath it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import Tensor

from llama.errors import MissingPackageError, PromptError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = Union[str, "os.PathLike[str]", bytes, "Image"]  # str: a path or a data URL

FP32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever a program's defaults are
MAX_BYTES = 50_000_000
MAX_PIXELS = 2**26  # 67 million; the largest canvas has 1.3 million
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112  # EXIF 2.3, section 4.6.4
# Pillow's modes that convert to RGB without visible loss.
OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
TRANSPARENT = ("LA", "PA", "RGBA", "La", "RGBa")
# Statistics of CLIP's training data (Radford et al. 2021), by color channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class TiledImage:
    """An image as a vision model reads it: resized to fit a canvas of square tiles.

    pixels: uint8 (rows * columns, 3, size, size), RGB, row by row from the top left
    key: a hash of the pixels and the layout; equal keys mean equal images
    """

    pixels: Tensor
    rows: int
    columns: int
    key: str

    def normalized(self) -> Tensor:
        """The pixels in fp32, normalised by the encoder's training mean and standard deviation."""
        mean, std = (torch.tensor(values, **FP32).view(3, 1, 1) for values in (MEAN, STD))
        return self.pixels.float().div_(255).sub_(mean).div_(std)


def tile_image(source: ImageSource, size: int = 560, max_tiles: int = 4) -> TiledImage:
    """Open an image and split it into tiles.

    source: path, encoded bytes, data URL, or Pillow image
    size: side of a tile, in pixels
    max_tiles: maximum tiles on a canvas

    Bit-identical to Meta's preprocessing of the same RGB image in fp32, before normalisation.
    Raises what `open_image` raises.
    """
    from PIL import Image

    image = open_image(source)
    rows, columns = best_canvas(*image.size, size, max_tiles)
    canvas = Image.new("RGB", (columns * size, rows * size))  # black
    resized = fitted_size(*image.size, columns * size, rows * size, size)
    canvas.paste(image.resize(resized, Image.Resampling.BILINEAR))
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(rows, size, columns, size, 3).permute(0, 2, 4, 1, 3).flatten(0, 1).contiguous()
    digest = hashlib.sha256(f"{rows} {columns} {size} ".encode() + pixels.numpy().tobytes())
    return TiledImage(pixels, rows, columns, digest.hexdigest())


def best_canvas(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of tiles of the canvas that fits an image best.

    That is the canvas that needs the least enlarging or, if the image fits none, the least shrinking; of
    several, the smallest. Scales are compared in fp32, as in Meta's code.
    """
    canvases = [(r, n // r) for n in range(1, max_tiles + 1) for r in range(1, n + 1) if n % r == 0]
    sides = torch.tensor(canvases, **FP32) * size
    scales = torch.minimum(sides[:, 1] / width, sides[:, 0] / height).tolist()
    enough = [scale for scale in scales if scale >= 1]
    best = min(enough) if enough else max(scales)
    fitting = [canvas for canvas, scale in zip(canvases, scales, strict=True) if scale == best]
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1])


def fitted_size(width: int, height: int, canvas_width: int, canvas_height: int, size: int) -> tuple[int, int]:
    """Width and height of an image on its canvas: same proportions, enlarged to at most one tile's side."""
    most_wide = min(max(width, size), canvas_width)
    most_high = min(max(height, size), canvas_height)
    if most_wide / width < most_high / height:
        return most_wide, max(1, min(math.floor(height * (most_wide / width)), most_high))
    return max(1, min(math.floor(width * (most_high / height)), most_wide)), most_high


def open_image(source: ImageSource) -> Image:
    """An upright RGB Pillow image.

    source: path, encoded bytes, data URL, or Pillow image. Of an animation, the first frame is used.

    Raises FileNotFoundError if the file is missing, MissingPackageError if Pillow is missing, PromptError
    if the source is not an image, is too large, or does not have 8-bit colors.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackageError("images need the Pillow package: pip install -e '.[vision]'") from None
    image = source if isinstance(source, Image.Image) else _opened(image_bytes(source))
    if not image.width * image.height:
        raise PromptError(f"the image has no pixels: its size is {image.width} × {image.height}")
    if image.width * image.height > MAX_PIXELS:
        raise PromptError(
            f"the image has {image.width} × {image.height} pixels; scale it down to at most {MAX_PIXELS:,}"
        )
    if image.mode not in OPAQUE + TRANSPARENT:
        raise PromptError(f"the image has mode {image.mode!r}; convert it to 8-bit RGB")
    try:
        image.load()
        image = upright(image)
        if not image.has_transparency_data:
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # whatever Pillow's decoders run into
        raise PromptError(f"the image cannot be decoded and may be damaged: {error}") from None


def upright(image: Image) -> Image:
    """A decoded image, turned as its EXIF orientation says; unchanged if its EXIF data cannot be read."""
    from PIL import Image

    turns = Image.Transpose
    turn = {
        **{2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE},
        **{6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90},
    }
    # `ImageOps.exif_transpose` also writes the data anew, and fails on many a valid picture's.
    try:
        method = turn.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever Pillow's parser runs into; the pixels are good
        return image
    return image if method is None else image.transpose(method)


def image_bytes(source: object) -> bytes:
    """The bytes of an image file: those at a path, in a data URL, or the source itself.

    Raises FileNotFoundError if the file is missing, PromptError if there are too many, which are not read,
    or for any other source.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str) and source.startswith("data:"):
        return from_data_url(source)
    elif isinstance(source, str) and re.match(r"[a-z]+://", source):
        raise PromptError(
            f"images are not downloaded: download {source[:80]} yourself and pass its bytes or a path"
        )
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no image file {path}")
        if path.stat().st_size > MAX_BYTES:
            raise _too_large(path.stat().st_size)
        data = path.read_bytes()
    else:
        raise PromptError(
            "an image must be a path, bytes, a data URL or a Pillow image, not "
            f"{'None' if source is None else f'a {type(source).__name__}'}"
        )
    if len(data) > MAX_BYTES:
        raise _too_large(len(data))
    return data


def from_data_url(url: str) -> bytes:
    """The data in a URL of the form data:image/png;base64,… Raises PromptError for other URLs."""
    head, _, encoded = url.partition(",")
    if not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
        raise PromptError(f"an image's data URL must begin with data:image/TYPE;base64, not {head[:60]!r}")
    if len(encoded) * 3 // 4 > MAX_BYTES:
        raise _too_large(len(encoded) * 3 // 4)
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise PromptError(f"the image's data URL is not valid base64: {error}") from None


def _too_large(count: int) -> PromptError:
    return PromptError(f"the image file has {count:,} bytes; at most {MAX_BYTES:,} are accepted")


def _opened(data: bytes) -> Image:
    """A Pillow image whose header has been read, and nothing else."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise PromptError(f"the image has far more than {MAX_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # whatever Pillow's parsers run into
        reason = "it is not one of " + ", ".join(FORMATS)
        if not isinstance(error, UnidentifiedImageError):
            reason = f"it may be damaged: {error}"
        raise PromptError(f"the image cannot be opened, {reason}") from None
