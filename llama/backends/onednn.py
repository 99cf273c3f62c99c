"""bf16 weights in oneDNN's own layout, for CPUs.

A matrix laid out for the kernel streams at the memory's bandwidth for a single row, where a plain
bf16 `F.linear` reaches a quarter of it. The operators are private to PyTorch (Inductor uses them), so
they are tried first, and where they are missing nothing changes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama.model import Transformer
from llama.parallel import Joined, Linear, matrices


class Packed:
    """x Wᵀ for one packed weight, bf16 (…, in) to (…, out)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the compiler knows no packed tensors
    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether a weight's device, dtype and this build of PyTorch offer the packed layout."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    try:
        Packed(torch.ones(16, 16, dtype=torch.bfloat16))(torch.ones(1, 16, dtype=torch.bfloat16))
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


def pack(model: nn.Module) -> None:
    """Lay out every linear of a loaded model for its kernels: packed on a CPU where that is possible; on
    other devices, whatever reads the same input as one matrix."""
    weight = next(module.weight for module in model.modules() if isinstance(module, Linear))
    if weight.device.type not in ("cpu", "meta"):
        for module in model.modules():
            if isinstance(module, Joined):
                module.join()
    if can_pack(weight):
        replace_weights(model, lambda _, weight: Packed(weight))
        if isinstance(model, Transformer):
            # oneDNN 3.12 takes 1.3 times as long for one to three rows as for four.
            model.least_rows = 4


def replace_weights(
    model: torch.nn.Module, backend: Callable[[str, Tensor], Callable[[Tensor], Tensor]]
) -> None:
    """Give every linear of a loaded model the backend made of its name and its weight, (out, in).

    One after the other, and the plain weights are given up on the way, so that the model has no
    state dict afterwards.
    """
    for name, module, parts in matrices(model):
        weights: list[Tensor] = [part.weight for part in parts.values()]
        module.backend = backend(name, weights[0] if len(weights) == 1 else torch.cat(weights))
        for part in parts.values():
            del part.weight
