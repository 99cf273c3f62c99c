"""Packed bf16 weights: the same products, and a model that says the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llama import Llama
from llama.backends.onednn import Packed, can_pack, pack
from llama.parallel import Joined, Linear
from tests.support import tiny

packable = pytest.mark.skipif(
    not can_pack(torch.zeros(1, dtype=torch.bfloat16)),
    reason="this CPU or build of PyTorch has no packed bf16",
)


@packable
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
def test_a_packed_product_is_the_product(rows: int) -> None:
    weight, x = torch.randn(96, 200).bfloat16(), torch.randn(rows, 200).bfloat16()
    exact = x.double() @ weight.double().T
    plain, packed = F.linear(x, weight).double(), Packed(weight)(x).double()
    assert (packed - exact).abs().max() <= 1.5 * (plain - exact).abs().max()


@packable
def test_a_packed_model_has_every_linear_packed_once_and_says_the_same() -> None:
    tokens = torch.randint(0, tiny.VOCAB, (2, 20))
    exact = tiny.random_model(std=0.1)(tokens, 0).log_softmax(-1)
    model = tiny.random_model(std=0.1).bfloat16()
    plain = model(tokens, 0).log_softmax(-1)
    pack(model)
    packed = model(tokens, 0).log_softmax(-1)
    assert (packed - exact).abs().mean() < 1.2 * (plain - exact).abs().mean()
    held = [m for m in model.modules() if isinstance(m, Linear | Joined) and m.backend]
    assert len(held) == 4 * model.params.n_layers + 1
    assert not any("attention.w" in name or "output" in name for name in model.state_dict())


@packable
def test_a_single_token_goes_through_the_linears_in_four_rows_that_change_nothing() -> None:
    model = tiny.random_model(std=0.1).bfloat16()
    pack(model)
    tokens = torch.randint(0, tiny.VOCAB, (1, 6))
    heights: list[int] = []
    for module in model.modules():
        if isinstance(module, Linear | Joined) and module.backend:
            module.register_forward_pre_hook(lambda _, x: heights.append(len(x[0])))
    whole = model(tokens, 0)[0]
    single = torch.stack([model(tokens[:, i : i + 1], i)[0, 0] for i in range(6)])
    assert set(heights) == {6, 4}
    assert single.shape == whole.shape
    assert (single - whole).abs().max() < 0.05 * whole.abs().max()


def test_other_dtypes_and_devices_are_left_alone() -> None:
    model = tiny.random_model()
    before = list(model.state_dict())
    pack(model)
    assert list(model.state_dict()) == before
    assert not can_pack(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def test_without_the_private_operators_nothing_changes(monkeypatch: pytest.MonkeyPatch, ckpt: Path) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(Packed, "__init__", missing)
    llama = Llama.build(ckpt, max_seq_len=16, max_batch_size=1, dtype="bfloat16")
    assert "output.weight" in llama.model.state_dict()
    assert llama.generate([[1, 2]], 4)[0]
