"""The compiled step of a vision model, and the compiled attention of its image encoder."""

import math
import shutil
from functools import partial
from itertools import chain

import pytest
import torch
from torch import Tensor

from llama import backends
from llama.backends import native
from llama.engine import Engine
from llama.model import Row
from llama.sampling import SamplingParams
from llama.vision import Padding, PlacedImage, VisionTransformer, attend, tile_image
from tests.support.quantized import distance, reloaded
from tests.support.vision import IMAGE, picture, random_vision

if shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

# Token ids of prompts, and sizes of their images.
PROMPTS = [
    ([9, 30, 31, 400, 519, 7, 12, 99], []),
    ([IMAGE, 30, 31, 400, 519, 7, 12, 99, 3, 4, 5, 6], [(40, 50)]),
    ([1, IMAGE, 5, 6, 7, IMAGE, 8, 9, 10], [(100, 110), (40, 40)]),
    ([9, IMAGE, IMAGE, 9, 9, IMAGE, 9, 8], [(40, 40), (56, 150), (300, 40)]),
]


def placed(index: int) -> list[PlacedImage]:
    tokens, sizes = PROMPTS[index]
    at = [i for i, token in enumerate(tokens) if token == IMAGE]
    return [PlacedImage(i, tile_image(picture(*size), 56)) for i, size in zip(at, sizes, strict=True)]


def compiled(model: VisionTransformer, scheme: str | None = None, target: str | None = None):
    """A copy of a model, with a compiled step."""
    plan = backends.plan(model, model.device, model.dtype)
    if target is not None:
        plan = backends.Plan(
            plain=partial(native.pack, target=target),
            embeddings=True,
            step=partial(native.NativeStep, target=target),
            images=backends.Plan(),
        )
    found = reloaded(model, plan, scheme)
    assert isinstance(found, VisionTransformer)
    assert found.step_backend
    return found


def run(model: VisionTransformer, *rows: Row, of: list[int]) -> list[Tensor]:
    """Logits of rows of some prompts. Images are placed with the first tokens."""
    for row, index in zip(rows, of, strict=True):
        if row.start == 0:
            model.place(row.slot, placed(index))
    ids = [PROMPTS[index][0][row.start : row.stop] for row, index in zip(rows, of, strict=True)]
    found = model.logits(model.hidden(torch.tensor(list(chain.from_iterable(ids))), rows))
    return list(found.split([row.length for row in rows]))


def whole(model: VisionTransformer, index: int, slot: int = 0) -> Tensor:
    return run(model, Row(slot, 0, len(PROMPTS[index][0])), of=[index])[0]


def test_fp32_is_that_of_the_model(target: str | None) -> None:
    model = random_vision(max_batch_size=4)
    step = compiled(model, target=target)
    rows = [Row(slot, 0, len(PROMPTS[index][0])) for index, slot in enumerate((2, 0, 3, 1))]
    ours, theirs = (run(m, *rows, of=[0, 1, 2, 3]) for m in (step, model))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_long_images_of_several_chunks() -> None:
    """785 positions per tile: attention goes over four chunks of the cache, and is split among threads."""
    model = random_vision(vision_chunk_size=392, vision_layers=5, vision_taps=[3], vision_global_layers=1)
    step = compiled(model)
    image = PlacedImage(1, tile_image(picture(392, 500), 392))
    tokens = torch.tensor([[9, IMAGE, *range(20)]])
    torch.testing.assert_close(step(tokens, 0, [[image]]), model(tokens, 0, [[image]]), atol=1e-4, rtol=1e-4)
    more = torch.tensor([[5]])
    torch.testing.assert_close(step(more, 22), model(more, 22), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "scheme", [None, *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("int8", "int4"))]
)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_bits_do_not_depend_on_company_chunks_or_slots(dtype: torch.dtype, scheme: str | None) -> None:
    model = compiled(random_vision(max_batch_size=4).to(dtype), scheme)
    alone = [whole(model, index) for index in range(4)]
    model.forget_images()
    model.images.fill_(torch.nan)  # what nobody wrote is never read
    together = run(model, *(Row(3 - i, 0, len(PROMPTS[i][0])) for i in range(4)), of=[0, 1, 2, 3])
    assert all(map(torch.equal, together, alone))
    for start, stop in ((0, 1), (1, 5), (5, 6), (6, 8)):
        rows = [Row(i, start, stop - start) for i in range(4)]
        for found, expected in zip(run(model, *rows, of=[0, 1, 2, 3]), alone, strict=True):
            assert torch.equal(found, expected[start:stop])


@pytest.mark.slow
def test_bf16_is_as_close_to_fp32_as_the_model_is() -> None:
    model = random_vision().bfloat16().float()
    exact, theirs = whole(model, 2), whole(random_vision().bfloat16(), 2)
    ours = whole(compiled(random_vision().bfloat16()), 2)
    assert 0 < distance(ours, exact) < 1.1 * distance(theirs, exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["attention.wq", "attention.wo", "feed_forward.w2", "attention_norm", "attention.q_norm", "ffn_norm"],
)
def test_only_tokens_that_see_an_image_are_changed_by_it(name: str) -> None:
    model = random_vision()
    before = whole(compiled(model), 2)
    model.get_parameter(f"cross_attention_layers.0.{name}.weight").view(-1)[::3] *= 2
    found = whole(compiled(model), 2)
    assert torch.equal(found[:1], before[:1])
    assert ((found[1:] - before[1:]).abs().amax(1) > 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gate_attn", "gate_ffwd", "attention.q_norm.weight", "ffn_norm.weight"])
def test_edited_small_weights_are_noticed(name: str) -> None:
    model = random_vision()
    step = compiled(model)
    before = whole(step, 1)
    for each in (model, step):
        each.get_parameter(f"cross_attention_layers.1.{name}").mul_(0.5)
    assert not torch.allclose(whole(step, 1), before, atol=1e-3)
    torch.testing.assert_close(whole(step, 1), whole(model, 1), atol=1e-4, rtol=1e-4)


def test_ids_of_added_embeddings() -> None:
    model = random_vision()
    step, tokens, images = compiled(model), torch.tensor([[IMAGE, IMAGE + 7]]), placed(1)
    torch.testing.assert_close(step(tokens, 0, [images]), model(tokens, 0, [images]), atol=1e-4, rtol=1e-4)
    with pytest.raises(IndexError, match=f"0 to {IMAGE + 7}"):
        step(torch.tensor([[IMAGE + 8]]), 0)


def test_images_are_encoded_by_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps to one beside a step, but not before it."""
    model, seen = compiled(random_vision()), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda image: seen.append(torch.get_num_threads()) or encode(image))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine = Engine(model)
        images = [image for _, image in placed(1)]
        for _ in engine.run([engine.add(PROMPTS[1][0], SamplingParams(max_tokens=2), images=images)]):
            pass
    finally:
        torch.set_num_threads(before)
    assert seen == [3]


def qkv(n: int, heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, heads, head_dim, generator=generator).mul_(1.5).to(dtype)


@pytest.mark.parametrize(
    ("n", "heads", "head_dim", "valid", "missing"),
    [
        (1300, 2, 80, 1290, 0),
        (1300, 1, 80, 600, 680),
        (72, 4, 16, 68, 0),
        (40, 4, 16, 17, 20),
        (300, 1, 48, 290, 0),
    ],
)
def test_attention_among_an_images_tokens(
    n: int, heads: int, head_dim: int, valid: int, missing: int
) -> None:
    if not native.library().llama_sees():
        pytest.skip("this processor has no AMX")
    x, bias = qkv(n, heads, head_dim), None
    if missing:
        bias = torch.zeros(n, dtype=torch.bfloat16)
        bias[-missing:] = math.log(3)
    exact = in_fp32(x, valid, bias)
    ours, theirs = (f(x, Padding(valid, bias)) for f in (native.attend_image, attend))
    assert not torch.equal(ours, theirs)  # or it was not this code
    for rows in (slice(valid), slice(valid, n)):
        assert distance(ours[rows], exact[rows]) < 1.1 * distance(theirs[rows], exact[rows])
    # Scores of any size, and what is broken stays so.
    x[:, :2] *= 30
    assert distance(native.attend_image(x, Padding(valid, bias)), in_fp32(x, valid, bias)) < 0.01
    x[valid // 2, 1] = torch.nan
    assert native.attend_image(x, Padding(valid, bias)).isnan().all()


def in_fp32(x: Tensor, valid: int, bias: Tensor | None) -> Tensor:
    return attend(x.float(), Padding(valid, None if bias is None else bias.float()))


@pytest.mark.parametrize(
    "shape", [(40, 2, 24, torch.bfloat16), (40, 2, 32, torch.float32), (40, 0, 16, torch.bfloat16)]
)
def test_attention_that_is_not_compiled(shape: tuple) -> None:
    x, padding = qkv(*shape), Padding(33, None)
    assert torch.equal(native.attend_image(x, padding), attend(x, padding))
