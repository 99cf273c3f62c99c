"""Vision against Meta's own code, in fp32."""

import functools
import os
import shutil

import pytest
import torch
import torch.distributed as dist

from llama import backends
from llama.errors import ArgumentError
from llama.parallel import ModelParallel
from llama.vision import PlacedImage, VisionArgs, VisionTransformer, tile_image
from tests.support.quantized import reloaded
from tests.support.vision import ENCODER, IMAGE, PARAMS, picture


@pytest.fixture(scope="module")
def group():
    from fairscale.nn.model_parallel import initialize as topology

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    topology.initialize_model_parallel(1)
    yield
    topology.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def meta(group):
    from tests.support import meta_vision

    return meta_vision.build()


@pytest.fixture(scope="module")
def metas_logits(meta):
    from tests.support import meta_vision

    return functools.partial(meta_vision.logits, meta)


def ours(meta, **changes) -> VisionTransformer:
    args = {**PARAMS, **ENCODER, "max_seq_len": 64, "max_batch_size": 4, "max_images": 4, **changes}
    with torch.device("meta"):
        model = VisionTransformer(VisionArgs(**args))
    state = {name.removeprefix("text_model."): w for name, w in meta.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


@pytest.fixture(scope="module", params=["PyTorch", "compiled"])
def model(request, meta):
    if request.param == "PyTorch":
        return ours(meta)
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    model = ours(meta)
    model = reloaded(model, backends.plan(model, model.device, model.dtype))
    assert model.step_backend
    return model


SIZES = {(1, 1): (40, 50), (1, 2): (112, 50), (1, 3): (168, 56), (1, 4): (230, 40)}
SIZES |= {(2, 1): (50, 100), (2, 2): (100, 110), (3, 1): (56, 150), (4, 1): (30, 300)}


def placed(tokens, images):
    at = [i for i, token in enumerate(tokens) if token == IMAGE]
    return [PlacedImage(i, tile_image(im, 56)) for i, im in zip(at, images, strict=True)]


@pytest.fixture(scope="module")
def metas_features(meta):
    """What Meta's encoder makes of the image for a canvas, each once."""

    @functools.cache
    def of(canvas):
        pixels, ratio = meta.image_transform(image := picture(*SIZES[canvas]))
        assert torch.equal(pixels, tile_image(image, 56).normalized())
        stacked = torch.nn.functional.pad(pixels, (0, 0) * 3 + (0, 4 - len(pixels)))[None, None]
        return meta.vision_model(stacked, torch.tensor([[ratio]]))[0, 0, : len(pixels)].flatten(0, 1)

    return of


@pytest.mark.parametrize("canvas", SIZES)
def test_the_encoder_is_metas_on_every_canvas(metas_features, model, canvas):
    tiled = tile_image(picture(*SIZES[canvas]), 56)
    assert (tiled.rows, tiled.columns) == canvas
    expected = metas_features(canvas)
    torch.testing.assert_close(model.encode(tiled), expected, atol=1e-4, rtol=1e-4)


TEXT = [9, 30, 31, 400, 519, 7, 12, 99]
PROMPTS = {
    "text only": (TEXT, []),
    "image first": ([IMAGE, *TEXT[1:]], [(40, 50)]),
    "text, image": ([*TEXT[:4], IMAGE, *TEXT[5:]], [(112, 50)]),
    "image last": ([*TEXT[:7], IMAGE], [(112, 50)]),
    "two images": ([1, IMAGE, 5, 6, 7, IMAGE, 8, 9], [(100, 110), (40, 40)]),
    "consecutive": ([9, IMAGE, IMAGE, 9, 9, IMAGE, 9, 8], [(40, 40), (56, 150), (300, 40)]),
}


def pictures(sizes):
    return [picture(*size, seed=i) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("kind", PROMPTS)
def test_logits_are_metas(metas_logits, model, kind):
    tokens, sizes = PROMPTS[kind]
    images = pictures(sizes)
    expected = metas_logits([tokens], [images], len(tokens))
    found = model(torch.tensor([tokens]), 0, [placed(tokens, images)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_batch_may_mix_all(metas_logits, model):
    kinds = ["text only", "image first", "consecutive", "text, image"]
    prompts = [PROMPTS[kind][0] for kind in kinds]
    images = [pictures(PROMPTS[kind][1]) for kind in kinds]
    expected = metas_logits(prompts, images, 8)
    found = model(torch.tensor(prompts), 0, [placed(*pair) for pair in zip(prompts, images, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_and_single_steps_give_the_same(model, kind, chunk):
    tokens, sizes = PROMPTS[kind]
    images = placed(tokens, pictures(sizes))
    prompt = torch.tensor([tokens])
    whole = model(prompt, 0, [images])
    parts = [
        model(prompt[:, at : at + chunk], at, [images] if at == 0 else None) for at in range(0, 8, chunk)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_after_two_images_new_tokens_see_what_the_last_of_the_prompt_sees(metas_logits, model):
    tokens, sizes = PROMPTS["two images"]
    images, following = pictures(sizes), [7, 7, 7]
    model(torch.tensor([tokens]), 0, [placed(tokens, images)])
    found = model(torch.tensor([following]), 8)
    # In Meta's code the span of the last image has to be told to go on.
    expected = metas_logits([tokens + following], [images], 11)[:, 8:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    blind = [*tokens[:5], 9, *tokens[6:]]
    model(torch.tensor([blind]), 0, [placed(blind, images[:1])])
    assert not torch.allclose(found, model(torch.tensor([following]), 8), atol=0.1)


def test_an_image_that_some_slot_holds_is_not_encoded_again(meta):
    model = ours(meta)
    encode, calls = model.encode, []
    model.encode = lambda image: calls.append(image.key) or encode(image)
    tokens, sizes = PROMPTS["consecutive"]
    images = placed(tokens, pictures(sizes))
    first = model(torch.tensor([tokens]), 0, [images])
    assert len(calls) == 3
    again = model(torch.tensor([tokens, tokens]), 0, [images, images])
    assert len(calls) == 3
    assert torch.allclose(again, first.expand(2, -1, -1), atol=1e-5)
    # In another order.
    order = (1, 0, 2)
    swapped = [PlacedImage(images[i].position, images[j].image) for i, j in enumerate(order)]
    found = model(torch.tensor([tokens]), 0, [swapped])
    assert len(calls) == 3
    assert torch.allclose(found, ours(meta)(torch.tensor([tokens]), 0, [swapped]), atol=1e-4)


def test_only_as_many_images_as_the_cache_has_room_for(model):
    images = placed([IMAGE] * 5, pictures([(40, 40)] * 5))
    with pytest.raises(ArgumentError, match="5 images, but max_images=4"):
        model.place(0, images)


@pytest.mark.parametrize("limits", [(56, 8), (112, 4)])
def test_only_tiles_that_the_model_reads(model, limits):
    image = PlacedImage(0, tile_image(picture(400, 56), *limits))
    with pytest.raises(
        ArgumentError, match=r"1 to 4 tiles of \(3, 56, 56\): make it with tile_image\(…, 56, 4\)"
    ):
        model.place(0, [image])


def test_text_does_no_vision_work(meta):
    model = ours(meta)
    for part in (model.vision_model, model.cross_attention_layers):
        part.to_empty(device="meta")
    assert torch.equal(model(torch.tensor([TEXT]), 0), ours(meta)(torch.tensor([TEXT]), 0))


@pytest.mark.parametrize("size", [2, 4, pytest.param(32, marks=pytest.mark.slow)])
def test_ranks_hold_even_parts(size):
    """Shapes only; of more ranks than the encoder has heads, some have none."""
    args = {**PARAMS, **ENCODER, "n_heads": 32, "n_kv_heads": 8, "vision_layers": 1, "vision_taps": [0]}
    parts = []
    for rank in range(size):
        with torch.device("meta"):
            parts.append(VisionTransformer(VisionArgs(**args), ModelParallel(rank, size)))
    heads = [part.vision_model.vision_encoder.transformer.resblocks[0].attn.heads for part in parts]
    assert sum(heads) == ENCODER["vision_heads"]
