"""Packed bf16 weights: the same products, and a model that says the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llama import Llama, backends
from llama.backends.onednn import Packed, can_pack
from llama.model import Transformer
from llama.parallel import Joined, Linear
from tests.support import tiny

CPU = torch.device("cpu")
packable = pytest.mark.skipif(
    not can_pack(CPU, torch.bfloat16), reason="this CPU or build of PyTorch has no packed bf16"
)
TOKENS = torch.randint(0, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))


@packable
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
def test_a_packed_product_is_the_product(rows: int) -> None:
    weight, x = torch.randn(96, 200).bfloat16(), torch.randn(rows, 200).bfloat16()
    exact = x.double() @ weight.double().T
    plain, packed = F.linear(x, weight).double(), Packed(weight)(x).double()
    assert (packed - exact).abs().max() <= 1.5 * (plain - exact).abs().max()


@packable
@pytest.mark.parametrize("gelu", [False, True])
def test_a_fused_product_adds_a_bias_and_applies_gelu(gelu: bool) -> None:
    weight, bias, x = (
        torch.randn(96, 200).bfloat16(),
        torch.randn(96).bfloat16(),
        torch.randn(70, 200).bfloat16(),
    )
    exact, plain = x.double() @ weight.double().T + bias.double(), F.linear(x, weight, bias)
    if gelu:
        exact, plain = F.gelu(exact), F.gelu(plain)
    found = Packed(weight).fused(x, bias, gelu).double()
    assert (found - exact).abs().mean() <= 1.1 * (plain.double() - exact).abs().mean()


def load(folder: Path, dtype: str) -> Transformer:
    return Llama.build(folder, max_seq_len=32, max_batch_size=2, dtype=dtype, device="cpu").model


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch, ckpt: Path) -> Transformer:
    plan = backends.Plan(plain=Packed, joins=True, least_rows=4)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "plan", lambda *_, **__: plan)
        return load(ckpt, "bfloat16")


@packable
def test_a_packed_model_has_every_linear_packed_once_and_says_the_same(
    packed: Transformer, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = load(ckpt, "float32")(TOKENS, 0).log_softmax(-1)
    monkeypatch.setattr(backends, "plan", lambda *_, **__: backends.Plan())
    plain = load(ckpt, "bfloat16")(TOKENS, 0).log_softmax(-1)
    assert (packed(TOKENS, 0).log_softmax(-1) - exact).abs().mean() < 1.2 * (plain - exact).abs().mean()
    held = [m for m in packed.modules() if isinstance(m, Linear | Joined) and m.backend]
    assert len(held) == 4 * packed.params.n_layers + 1
    assert not any("attention.w" in name or "output" in name for name in packed.state_dict())


@packable
def test_a_single_token_goes_through_the_linears_in_four_rows_that_change_nothing(
    packed: Transformer,
) -> None:
    tokens = TOKENS[:1, :6]
    heights: list[int] = []
    for module in packed.modules():
        if isinstance(module, Linear | Joined) and module.backend:
            module.register_forward_pre_hook(lambda _, x: heights.append(len(x[0])))
    whole = packed(tokens, 0)[0]
    single = torch.stack([packed(tokens[:, i : i + 1], i)[0, 0] for i in range(6)])
    assert set(heights) == {6, 4}
    assert single.shape == whole.shape
    assert (single - whole).abs().max() < 0.05 * whole.abs().max()


def test_other_dtypes_and_devices_are_not_packed() -> None:
    assert not can_pack(CPU, torch.float32)
    assert not can_pack(torch.device("meta"), torch.bfloat16)


def test_without_the_private_operators_it_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(Packed, "__init__", missing)
    assert not can_pack(CPU, torch.bfloat16)
