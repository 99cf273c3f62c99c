"""Weights of 8, 5 and 4 bits: right numbers, and a model that says almost the same."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from llama import Llama, backends
from llama.backends import Plan, native
from llama.backends.grouped import Grouped
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.checkpoint.reader import RankReader
from llama.device import resident_bytes
from llama.loading import check_quantize, weight_bytes
from llama.model import ModelArgs, Transformer
from llama.parallel import Joined, Linear, ModelParallel
from llama.quantization import QuantizedMatrix, alike, joined
from llama.quantizer import SEARCHES, quantize
from tests.support import tiny
from tests.support.quantized import KEPT, TOKENS, build, distance

SCHEMES = ["int8", "int5", "int4"]
BYTES = {8: 32 + 2, 5: 20 + 4, 4: 16 + 4}  # of a group
# The error of steps as wide as a normal distribution's range of 32 values, about 4.1 deviations, demands.
LIMITS = {8: 4.1 / 255 / math.sqrt(12) * 1.2, 5: 4.1 / 31 / math.sqrt(12), 4: 4.1 / 15 / math.sqrt(12) * 0.96}


@pytest.mark.parametrize("bits", BYTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_close_and_few(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(48, 128).to(dtype)
    weight[0, :32], weight[1] = 0.5, 0  # groups of one value
    found = quantize(weight, bits)
    assert isinstance(found, QuantizedMatrix)
    assert (found.bits, found.shape, found.nbytes) == (bits, (48, 128), 48 * 4 * BYTES[bits])
    assert distance(found.dequantize(), weight) < LIMITS[bits]
    torch.testing.assert_close(found.dequantize()[:1, :32], weight[:1, :32].float(), rtol=1e-3, atol=0)
    assert found.dequantize()[1].abs().max() < 1e-6
    assert torch.equal(found.dequantize(torch.bfloat16), found.dequantize().bfloat16())
    assert quantize(found, bits) is found and quantize(found, 8) is found
    assert quantize(weight[:, :40], bits).shape == (48, 40)  # no whole groups: as it was


def test_least_squares_follow_what_is_important() -> None:
    weight, importance = torch.randn(64, 128), torch.rand(128) ** 8
    errors = []
    for counts in (None, importance):
        found = quantize(weight, 4, counts)
        assert isinstance(found, QuantizedMatrix)
        errors.append(((found.dequantize() - weight).square() * importance).sum())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("bits", BYTES)
def test_parts_and_their_union(bits: int) -> None:
    whole = quantize(torch.randn(40, 128), bits)
    assert isinstance(whole, QuantizedMatrix)
    exact = whole.dequantize()
    parts = [whole.narrow(0, 0, 7), whole.narrow(0, 7, 40)]
    assert torch.equal(joined(parts).dequantize(), exact)  # type: ignore[union-attr]
    parts = [whole.narrow(1, 0, 32), whole.narrow(1, 32, 128)]
    assert alike(parts) and torch.equal(joined(parts, 1).dequantize(), exact)  # type: ignore[union-attr]
    cut = whole.narrow(1, 16, 50)
    assert isinstance(cut, torch.Tensor) and torch.equal(cut, exact[:, 16:50])
    assert not alike([cut, whole]) and not alike([quantize(exact, 8), quantize(exact, 5)])


@pytest.mark.slow
@pytest.mark.parametrize("bits", BYTES)
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_product_is_that_of_the_numbers(bits: int, rows: int, backend: str | None) -> None:
    weight, x = quantize(torch.randn(48, 128), bits), torch.randn(rows, 128)
    assert isinstance(weight, QuantizedMatrix)
    product = Grouped(weight)
    torch._dynamo.reset()
    run = torch.compile(lambda x: product(x), fullgraph=True, backend=backend) if backend else product
    torch.testing.assert_close(run(x), x @ weight.dequantize().T, rtol=1e-4, atol=1e-4)
    assert run(x.bfloat16()).dtype == torch.bfloat16


def blank(size: int = 1, rank: int = 0, **params: object) -> Transformer:
    """A rank's part of a model without weights."""
    with torch.device("meta"):
        return Transformer(ModelArgs(**{**tiny.PARAMS, **params}), ModelParallel(rank, size))


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.1), ("int5", 0.35), ("int4", 0.7)])
def test_a_model_says_almost_the_same(scheme: str, limit: float, tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "tiny", multiple_of=32)
    exact, found = (build(folder, which).model for which in (None, scheme))
    error = distance(found(TOKENS, 0), exact(TOKENS, 0))
    assert limit / 10 < error < limit


@pytest.mark.parametrize(
    ("scheme", "tied"), [("int8", False), ("int5", True), ("int4", False), ("int4", True)]
)
@pytest.mark.slow
def test_kept_as_they_are_or_dequantized_folder_or_source(
    scheme: str,
    tied: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", 2, tied=tied)  # inputs of w2 are no whole groups
    expected = None
    for plan in (Plan(missing="it is a test"), KEPT):
        monkeypatch.setattr(backends, "plan", lambda *_, plan=plan, **__: plan)
        for shards in (None, 5):
            saved = tmp_path / f"{shards}"
            if not saved.exists():
                convert(source, saved, quantize=scheme, shards=shards)
            assert len([*saved.glob("consolidated.*.pth")]) == (shards or 1)
            llama = build(saved)
            assert llama.quantization == scheme
            logits = llama.model(TOKENS, 0)
            expected = logits if expected is None else expected
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(build(source, scheme).model(TOKENS, 0), logits)
        said = capfd.readouterr().err
        assert (f"The {scheme} weights are dequantized to float32" in said) == (plan is not KEPT)
        assert ("without the compiled step: it is a test" in said) == (plan is not KEPT)
        held = [m.backend for m in llama.model.modules() if isinstance(m, Linear | Joined) and m.backend]
        assert len(held) == (3 * llama.model.params.n_layers + 1 if plan is KEPT else 0)
        counted = weight_bytes(blank(), open_checkpoint(saved).weights, plan, torch.float32, scheme)
        assert 0.96 < resident_bytes(llama.model) / counted <= 1  # minima are counted, and 8 bits have none
    other = "int4" if scheme == "int8" else "int8"
    with pytest.raises(ValueError, match=f"holds {scheme} weights, so quantize='{other}' is not possible"):
        build(saved, other)


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_reads_its_groups(rank: int, tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", multiple_of=64)
    weights = open_checkpoint(convert(source, tmp_path / "saved", quantize="int4")).weights
    with RankReader(blank(4, rank, multiple_of=64), weights) as reader:
        for name, part in reader.parts.items():
            whole, read = weights.read(name), reader.read(name)
            if part.dim is not None:
                whole = torch.cat([whole.narrow(part.dim, a, b - a) for a, b in part.spans], part.dim)
            cut = "wo" in name or "w2" in name  # 16 and 48 of their inputs
            assert isinstance(read, QuantizedMatrix) == (part.dim is not None and not cut)
            assert torch.equal(read.dequantize() if isinstance(read, QuantizedMatrix) else read, whole)


def test_unknown_schemes_and_devices_are_refused(ckpt: Path) -> None:
    with pytest.raises(ValueError, match="quantize must be None or one of int8, int5, int4, fp8, not 'int3'"):
        Llama.build(ckpt, quantize="int3")
    with pytest.raises(ValueError, match="'fp8' needs a CUDA device, not cpu: use 'int8' or 'int4' instead"):
        Llama.build(ckpt, quantize="fp8", device="cpu")
    for scheme in (None, *SCHEMES):
        check_quantize(scheme, torch.device("mps"))


TEXT = """Water boils at a lower temperature on a mountain, because the air above it is thinner and presses
on it less. A pot of beans that takes an hour by the sea takes much longer in a village in the Andes, and
cooks there close the lid tightly, so that the steam cannot escape and the pressure rises."""


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.005), ("int5", 0.03), ("int4", 0.1)])
def test_the_demo_model_keeps_its_quality(scheme: str, limit: float, demo_ckpt: Path) -> None:
    nll = []
    for which in (None, scheme):
        with Llama.build(demo_ckpt, max_seq_len=128, max_batch_size=1, quantize=which) as llama:
            prompt = llama.tokenizer.encode(TEXT, bos=True, eos=False)
            _, logprobs = llama.generate([prompt], 0, logprobs=True, echo=True)
            assert logprobs
            nll.append(-sum(logprobs[0]) / len(prompt))
    assert abs(nll[1] / nll[0] - 1) < limit


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "size"), [("int8", 2), ("int4", 4)])
def test_ranks_agree(scheme: str, size: int, tmp_path: Path, on_ranks) -> None:
    source = tiny.write_checkpoint(tmp_path / "tiny", n_kv_heads=2)  # that four ranks repeat
    folder = convert(source, tmp_path / "saved", quantize=scheme, shards=3)
    done = on_ranks(size, "tests/support/ranks.py", "quantized", folder, tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    exact = build(folder).model(TOKENS, 0)
    for rank in range(size):
        assert distance(torch.load(f"{tmp_path}/seen.{rank}"), exact) < 0.04  # of activations in 8 bits


def test_without_a_compiled_step_few_bits_are_kept_if_there_is_a_compiler(monkeypatch) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=64)
    model, cpu = Transformer(args, ModelParallel(0, 2)), torch.device("cpu")
    plan = backends.plan(model, cpu, torch.bfloat16, "int8")
    assert (plan.step, plan.quantized, plan.least_rows) == (None, native.pack_quantized, 1)
    assert backends.plan(model, cpu, torch.bfloat16, "int8", whole_steps=False).quantized is None

    def missing() -> None:
        raise native.UnavailableError("no C++ compiler was found")

    monkeypatch.setattr(native, "library", missing)
    assert backends.plan(model, cpu, torch.bfloat16, "int8").quantized is None


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("bits", [8, 5, 4])
def test_few_bits_are_those_that_pytorch_finds(
    target: str | None, bits: int, important: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(37, 32 * 19) * torch.rand(37, 1)
    weight[0, :32], weight[1], weight[2, 5] = 0.5, 0, 100  # one value, none, and an outlier
    weight[3] *= 1e-6  # scales below fp16's normal numbers
    importance = torch.rand(weight.shape[1]) ** 2 if important else None
    monkeypatch.delitem(SEARCHES, "cpu")
    for form in (weight, weight.bfloat16(), weight.half(), weight.T.contiguous().T):
        expected = quantize(form, bits, importance)
        assert isinstance(expected, QuantizedMatrix)
        found = QuantizedMatrix(*map(torch.empty_like, expected.tensors))
        native.search(form, found, importance, target)
        errors = [
            ((matrix.dequantize() - form.float()).square() * (1 if importance is None else importance)).sum(1)
            for matrix in (found, expected)
        ]
        torch.testing.assert_close(*errors, rtol=0.02, atol=1e-12)
        torch.testing.assert_close(errors[0].sum(), errors[1].sum(), rtol=1e-3, atol=0)
        for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
            assert (ours != theirs).float().mean() < 0.01
        if bits == 8 and not important:
            assert torch.equal(found.values, expected.values) and torch.equal(found.scales, expected.scales)
