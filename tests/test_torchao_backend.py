"""fp8 by torchao, as far as a CPU goes, and what is said where it cannot be."""

from pathlib import Path

import pytest
import torch

from llama import backends
from llama.backends import torchao
from llama.backends.torchao import Float8, check_float8
from tests.support.quantized import TOKENS, build, distance

CUDA = torch.device("cuda")


@pytest.fixture
def fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past torchao's question for the device, which a CPU fails and whose operator it has."""
    api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)


def test_a_product_has_scales_for_rows_and_tokens(fp8: None) -> None:
    weight, x = torch.randn(96, 256), torch.randn(5, 256)
    x *= 10.0 ** torch.arange(5)[:, None]
    product = Float8(weight)
    assert type(product.weight).__name__ == "Float8Tensor"
    assert product.weight.scale.shape == (96, 1)  # type: ignore[attr-defined]
    assert product(x).dtype == torch.float32
    for one, exact in zip(product(x), x @ weight.T, strict=True):
        assert distance(one, exact) < 0.05
    odd = Float8(weight[:90])
    assert odd.weight.dtype == torch.bfloat16
    assert distance(odd(x), x @ weight[:90].T) < 5e-3


def test_a_whole_model(fp8: None, ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = build(ckpt).model(TOKENS, 0)
    model = torch.empty(0)
    plan = backends.plan(model, CUDA, torch.float32, "fp8")  # type: ignore[arg-type]
    monkeypatch.setattr(backends, "plan", lambda *_, **__: plan)
    assert 0.01 < distance(build(ckpt).model(TOKENS, 0), exact) < 0.6


@pytest.mark.parametrize("found", [(7, 5), (8, 0), (8, 9), (12, 0)])
def test_a_device_is_asked_for_its_capability(
    found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(torchao, "find_spec", lambda name: name)
    if found >= (8, 9):
        return check_float8(CUDA)
    with pytest.raises(ValueError, match=rf"needs a CUDA .* 8\.9, but this one has {found[0]}\."):
        check_float8(CUDA)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'fp8' needs a CUDA device, not cpu"):
        check_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torchao, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs the torchao package: pip install -c constraints.txt -e '.\[quant\]'"
    ):
        check_float8(CUDA)
