"""Quantized weights as torchao's tensors: what it runs on a CPU is run here, the rest is put together."""

from pathlib import Path

import pytest
import torch

from llama import loading
from llama.backends import torchao as torchao_backend
from llama.backends.torchao import CAPABILITIES, TorchAO, float8, from_stored
from llama.loading import check_quantize
from llama.parallel import Joined, Linear
from llama.quantization import Quantizer, dequantized
from tests.support.quantized import TOKENS, build, distance, x86

CUDA = torch.device("cuda")


def stored(weight: torch.Tensor, four: bool) -> tuple[torch.Tensor, ...]:
    quantizer = Quantizer("int4", weight.shape[1], lambda name: weight)
    return quantizer.matrix("layers.0.attention.wq.weight", weight, four)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bits_are_the_stored_ones(dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    weight, x = stored(torch.randn(96, 256), False), torch.randn(5, 256).to(dtype)
    product = from_stored(weight, dtype)
    assert type(product.weight).__name__ == "Int8Tensor"
    torch.testing.assert_close(product.weight.dequantize().float(), dequantized(weight), rtol=4e-3, atol=0)
    exact = x.double() @ dequantized(weight).double().T
    assert product(x).dtype == dtype
    assert distance(product(x), exact) < (1e-6 if dtype == torch.float32 else 5e-3)
    for row, alone in zip(product(x), x, strict=True):
        torch.testing.assert_close(row, product(alone[None])[0], rtol=2e-2, atol=1e-2)


def test_fp16_holds_the_sums_of_8_bits() -> None:
    pytest.importorskip("torchao")
    weight, x = stored(torch.ones(16, 1024), False), torch.ones(1, 1024, dtype=torch.float16)
    torch.testing.assert_close(from_stored(weight, torch.float16)(x), x.sum().expand(1, 16))


@pytest.mark.parametrize("rows", [1, 5])
def test_8_bits_are_compiled_whole(rows: int) -> None:
    pytest.importorskip("torchao")
    product, x = from_stored(stored(torch.randn(96, 256), False), torch.float32), torch.randn(rows, 256)
    compiled = torch.compile(lambda x: product(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), product(x))


# A CPU has an operator with the same meaning, in another layout.
@pytest.mark.parametrize("shape", [(96, 1024), (100, 96)])
def test_4_bits_reach_the_kernel_padded_and_in_its_order(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    packed = []

    def pack(pairs: torch.Tensor, tiles: int) -> torch.Tensor:
        assert (pairs.dtype, tiles, pairs.is_contiguous()) == (torch.uint8, 8, True)
        packed.append(pairs)
        return pairs[None, None]

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", pack)
    weight = stored(torch.randn(shape), True)
    product = from_stored(weight, torch.bfloat16)
    assert product.weight.shape == shape
    assert product.weight.block_size == [1, 32]
    [pairs] = packed
    rows, columns = -(-shape[0] // 8) * 8, -(-shape[1] // 1024) * 1024
    scales, zeros = product.weight.scale_and_zero.unbind(-1)  # (groups, rows)
    assert scales.shape == (columns // 32, rows)
    assert product.weight.scale_and_zero.is_contiguous()
    values = torch.stack((pairs >> 4, pairs & 15), -1).flatten(1)
    assert values.shape == (rows, columns)
    repeat = (t.T.float().repeat_interleave(32, 1) for t in (scales, zeros))
    whole = (values.float() - 8) * next(repeat) + next(repeat)
    assert torch.equal(whole[: shape[0], : shape[1]], dequantized(weight))
    assert not whole[shape[0] :].any()
    assert not whole[:, shape[1] :].any()


def test_fp8_is_torchaos_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its question for the device, which a CPU fails and whose operator it has."""
    api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)
    weight, x = torch.randn(96, 256), torch.randn(5, 256)
    x *= 10.0 ** torch.arange(5)[:, None]  # each token has a scale of its own
    product = float8(weight)
    assert type(product.weight).__name__ == "Float8Tensor"
    assert product.weight.scale.shape == (96, 1)
    assert product(x).dtype == torch.float32
    for one, exact in zip(product(x), x @ weight.T, strict=True):
        assert distance(one, exact) < 0.05
    odd = float8(weight[:90])
    assert odd.weight.dtype == torch.bfloat16
    assert distance(odd(x), x @ weight[:90].T) < 5e-3


@x86
def test_a_whole_model_from_a_folder(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device would run of turned weights, on this CPU: the model that its source is."""
    pytest.importorskip("torchao")
    from llama.checkpoint.convert import convert

    exact = build(ckpt).model(TOKENS, 0)
    saved = convert(ckpt, tmp_path / "saved", quantize="int8")
    monkeypatch.setattr(loading, "backend", lambda name, whole: from_stored(whole, torch.float32))
    model = build(saved).model
    held = [m.backend for m in model.modules() if isinstance(m, Linear | Joined) and m.backend]
    assert {type(product) for product in held} == {TorchAO}
    assert distance(model(TOKENS, 0), exact) < 0.15


@pytest.mark.parametrize(
    ("found", "refused"), [((7, 5), {"int4", "fp8"}), ((8, 0), {"fp8"}), ((8, 9), set()), ((12, 0), set())]
)
def test_a_device_is_asked_for_its_capability(
    found: tuple[int, int], refused: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(torchao_backend, "find_spec", lambda name: name)
    for scheme in CAPABILITIES:
        if scheme in refused:
            with pytest.raises(
                ValueError, match=rf"'{scheme}' needs a CUDA .* and this one has {found[0]}\."
            ):
                check_quantize(scheme, CUDA)
        else:
            check_quantize(scheme, CUDA)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch finds no CUDA device here"):
        check_quantize("int8", CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torchao_backend, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs the torchao package: pip install -c constraints.txt -e '.\[quant\]'"
    ):
        check_quantize("fp8", CUDA)
