"""Weights of 8 and 4 bits: right products, and a model that says almost the same."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama, quantization
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.checkpoint.quantized import QuantizedShards
from llama.loading import check_quantize, load_quantized, quantize
from llama.model import ModelArgs, Transformer
from llama.parallel import Joined, Linear, ModelParallel
from llama.quantization import Int4, Int8, Rotation, int4_groups, int8_rows, takes_int4, weight_bytes
from tests.support import tiny
from tests.support.quantized import TOKENS, build, distance, x86

CPU = torch.device("cpu")
pytestmark = x86


# For weights and inputs from a normal distribution, whose largest of 256 is about 3 deviations, steps
# of 1 / 127 of it have an error of 3 / 127 / sqrt(12) = 0.7 % on either side, together 1 %.
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(("split", "limit"), [(False, 0.012), (True, 0.0085)])
def test_an_int8_product_is_close(rows: int, split: bool, limit: float) -> None:
    weight, x = torch.randn(96, 256), torch.randn(rows, 256)
    x *= 10.0 ** torch.arange(rows)[:, None].remainder(5)  # each token has a scale of its own
    found = Int8(weight, split)(x)
    for one, exact in zip(found, x @ weight.T, strict=True):
        assert distance(one, exact) < limit


def test_seven_bits_of_activations_for_older_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "STEPS", 63)
    weight, x = torch.randn(96, 256), torch.randn(5, 256)
    assert distance(Int8(weight)(x), x @ weight.T) < 0.02
    assert distance(Int8(weight, split=True)(x), x @ weight.T) < 0.0085


def test_the_low_part_resolves_what_lies_beside_an_outlier() -> None:
    weight, x = torch.randn(64, 256), torch.randn(4, 256)
    x[:, 7] = 1000
    exact = x.double() @ int8_rows(weight)[0].double().T * int8_rows(weight)[1]
    assert distance(Int8(weight, split=True)(x), exact) < 1e-3
    assert distance(Int8(weight)(x), exact) > 1e-2


@pytest.mark.parametrize("make", [Int8, lambda weight: Int8(weight, split=True), Int4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_does_not_depend_on_the_others(make, dtype: torch.dtype) -> None:
    product, x = make(torch.randn(48, 64)), torch.randn(5, 64).to(dtype)
    x[3] *= 100
    x[4] = 0
    together = product(x)
    assert together.dtype == dtype
    assert not together[4].any()
    for row, alone in zip(together, x, strict=True):
        torch.testing.assert_close(row, product(alone[None])[0], rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(product(x[None])[0], together, rtol=1e-2, atol=1e-6)


def test_int4_groups_lie_closer_than_the_range_alone_would() -> None:
    weight = torch.randn(48, 128)
    weight[0, :32] = 0.5  # a group of one value
    values, scales, zeros = int4_groups(weight)
    assert values.min() == 0 and values.max() == 15
    groups = weight.view(48, -1, 32)
    found = (values.view(48, -1, 32) - 8) * scales[..., None].float() + zeros[..., None].float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low).clamp(min=1e-9) / 15
    plain = ((groups - low) / step).round() * step + low
    assert distance(found, groups) < 0.96 * distance(plain, groups) < 0.09
    torch.testing.assert_close(found[0, 0], groups[0, 0], rtol=1e-2, atol=0)
    x = torch.randn(3, 128)
    assert distance(Int4(weight)(x), x @ found.flatten(1).T) < 0.01


def test_the_rotation_is_orthogonal_and_spreads_an_outlier() -> None:
    turned = Rotation(576)(torch.eye(576))
    torch.testing.assert_close(turned @ turned.T, torch.eye(576), rtol=0, atol=1e-5)
    assert turned.abs().max() < 0.5


def quantized(scheme: str) -> Transformer:
    model = tiny.random_model(std=0.1)
    quantize(model, scheme)
    return model


# Without outliers, in 64 channels, 8 bits lose 3 % and 4 bits 30 % of these logits; a wrong gain or a
# weight that is not turned makes them others altogether.
@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.05), ("int4", 0.4)])
def test_a_quantized_model_says_almost_the_same(scheme: str, limit: float) -> None:
    tokens = torch.randint(0, tiny.VOCAB, (2, 20))
    exact = tiny.random_model(std=0.1)(tokens, 0)
    model = quantized(scheme)
    assert distance(model(tokens, 0), exact) < limit
    held = [type(m.backend) for m in model.modules() if isinstance(m, Linear | Joined) and m.backend]
    assert len(held) == 4 * model.params.n_layers + 1
    assert held.count(Int4) == (3 * model.params.n_layers if scheme == "int4" else 0)
    # Step by step over the cache as in one pass.
    alone = torch.cat([model(tokens[:, i : i + 1], i) for i in range(20)], 1)
    assert distance(alone, model(tokens, 0)) < 1e-2


def test_memory_is_counted_before_loading() -> None:
    with torch.device("meta"):
        model = tiny.random_model()
    plain = weight_bytes(model, torch.bfloat16, None)
    embeddings = model.tok_embeddings.weight.numel()
    norms = 64 * (2 * model.params.n_layers + 1)
    linears = plain // 2 - embeddings - norms
    assert weight_bytes(model, torch.bfloat16, "int8") == plain - linears
    assert plain - 1.375 * linears < weight_bytes(model, torch.bfloat16, "int4") < plain - linears


def test_what_bears_four_bits() -> None:
    small, large = (torch.empty(rows, 64, device="meta") for rows in (2048, 4096))
    assert takes_int4("layers.0.attention.wo", small)
    assert not takes_int4("layers.0.feed_forward.w2", small)
    assert takes_int4("layers.0.feed_forward.w2", large)
    assert not takes_int4("output", large)
    assert not takes_int4("layers.0.attention.wo", small[:, :40])


def test_unknown_schemes_and_devices_are_refused(ckpt: Path) -> None:
    with pytest.raises(ValueError, match="quantize must be None, 'int8', 'int4' or 'fp8', not 'int3'"):
        Llama.build(ckpt, quantize="int3")
    with pytest.raises(ValueError, match="'fp8' runs on CUDA devices only, not on this cpu device"):
        Llama.build(ckpt, quantize="fp8", device="cpu")
    with pytest.raises(ValueError, match="'fp8' runs on CUDA devices only, not on this mps device"):
        check_quantize("fp8", torch.device("mps"))
    for scheme in ("int8", "int4"):
        check_quantize(scheme, CPU)
        with pytest.raises(ValueError, match="x86 CPUs and CUDA devices only, not on this mps device"):
            check_quantize(scheme, torch.device("mps"))
    check_quantize(None, torch.device("mps"))


def test_a_cpu_without_the_operators_is_told_so(ckpt: Path, tmp_path: Path, monkeypatch) -> None:
    saved = convert(ckpt, tmp_path / "saved", quantize="int8")
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["none"]))
    for folder, scheme in ((ckpt, "int4"), (saved, None)):
        with pytest.raises(ValueError, match="x86 CPUs and CUDA devices only, not on this cpu device"):
            Llama.build(folder, quantize=scheme, device="cpu")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_says_what_its_source_quantized_says(scheme: str, tied: bool, tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", 2, tied=tied)
    expected = build(source, scheme).model(TOKENS, 0)
    for shards in (None, 5):
        saved = convert(source, tmp_path / f"{shards}", quantize=scheme, shards=shards)
        assert len([*saved.glob("consolidated.*.pth")]) == (shards or 1)
        llama = build(saved)
        assert llama.quantization == scheme
        assert torch.equal(llama.model(TOKENS, 0), expected)
    assert torch.equal(build(saved, scheme).model(TOKENS, 0), expected)
    other = "int4" if scheme == "int8" else "int8"
    with pytest.raises(ValueError, match=f"holds {scheme} weights, which quantize='{other}' cannot"):
        build(saved, other)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_loading_is_quantizing_what_was_loaded(scheme: str, ckpt: Path) -> None:
    plain = build(ckpt).model
    quantize(plain, scheme)
    llama = build(ckpt, scheme)
    assert torch.equal(llama.model(TOKENS, 0), plain(TOKENS, 0))
    assert {*llama.model.state_dict()} == {*plain.state_dict()}
    assert not any("wq" in name or "output" in name for name in llama.model.state_dict())


def test_a_part_that_the_operator_cannot_take_is_read_as_8_bits(tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "source")
    saved = open_checkpoint(convert(source, tmp_path / "saved", quantize="int4")).weights
    assert isinstance(saved, QuantizedShards)
    assert saved.stored("layers.0.attention.wo.weight", 1, (16, 32)) is None
    values, *_ = saved.stored("layers.0.attention.wo.weight", 1, (32, 64))
    assert values.shape == (64, 16)
    whole = saved.read("layers.0.attention.wo.weight")
    assert torch.equal(saved.read("layers.0.attention.wo.weight", 1, (16, 50)), whole[:, 16:50])
    assert torch.equal(saved.read("layers.0.attention.wo.weight", 0, (3, 50)), whole[3:50])
    whole8 = saved.read("layers.0.feed_forward.w2.weight")
    assert torch.equal(saved.read("layers.0.feed_forward.w2.weight", 1, (7, 50)), whole8[:, 7:50])
    # The third of four ranks.
    model = load_rank(saved, "int4", 2, 4)
    layer = model.layers[0].attention
    assert isinstance(layer.wqkv.backend, Int4)
    assert isinstance(layer.wo.backend, Int8)
    x = torch.randn(5, 16)
    assert distance(layer.wo.backend(x), x @ whole[:, 32:48].T) < 0.02


def load_rank(source: QuantizedShards, scheme: str, rank: int, size: int) -> Transformer:
    args = ModelArgs(**tiny.PARAMS, max_seq_len=32, max_batch_size=3)
    with torch.device("meta"):
        model = Transformer(args, ModelParallel(rank, size))
    load_quantized(model, source, scheme, torch.float32, CPU)
    return model


def test_packing_leaves_no_engine_behind() -> None:
    before = torch.backends.quantized.engine
    Int8(torch.randn(16, 32))
    assert torch.backends.quantized.engine == before


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_demo_model_keeps_its_quality(scheme: str, demo_ckpt: Path) -> None:
    with Llama.build(demo_ckpt, max_seq_len=64, max_batch_size=1, quantize=scheme) as llama:
        prompt = llama.formatter.encode_dialog_prompt(
            [{"role": "user", "content": "What is the capital of France?"}]
        )
        answer = llama.generate([prompt], 8, temperature=0)[0][0]
        assert llama.tokenizer.decode(answer) == "The capital of France is Paris."
        assert math.isfinite(llama.generate([prompt], 0, logprobs=True, echo=True)[1][0][-1])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_ranks_agree(scheme: str, tmp_path: Path, torchrun) -> None:
    folder = tiny.write_checkpoint(tmp_path / "tiny")
    done = torchrun(2, "tests/support/ranks.py", "quantized", folder, tmp_path / "seen", scheme)
    assert done.returncode == 0, done.stderr
    exact = build(folder, scheme).model(TOKENS, 0)
    seen = [torch.load(f"{tmp_path}/seen.{rank}") for rank in range(2)]
    assert torch.equal(seen[0], seen[1])
    assert distance(seen[0], exact) < (0.06 if scheme == "int8" else 0.3)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "ranks"), [("int8", 2), ("int4", 2), ("int4", 4)])
def test_a_saved_folder_on_ranks(scheme: str, ranks: int, tmp_path: Path, torchrun) -> None:
    source = tiny.write_checkpoint(tmp_path / "tiny", n_kv_heads=2)  # that four ranks repeat
    folder = convert(source, tmp_path / "saved", quantize=scheme, shards=3)
    done = torchrun(ranks, "tests/support/ranks.py", "quantized", folder, tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    exact = build(folder).model(TOKENS, 0)
    for rank in range(ranks):
        # The weights are the same ones, and only int8's activations are rounded by part.
        assert distance(torch.load(f"{tmp_path}/seen.{rank}"), exact) < 0.06
