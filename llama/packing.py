"""bf16 weights in oneDNN's own layout, for CPUs.

A matrix laid out for the kernel streams at the memory's bandwidth for a single row, where a plain
bf16 `F.linear` reaches a quarter of it. The operators are private to PyTorch (Inductor uses them), so
they are tried first, and where they are missing nothing changes.
"""

import torch
from torch import Tensor

from llama.parallel import Joined, Linear


class Packed:
    """x Wᵀ for one packed weight, bf16 (…, in) to (…, out)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

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


def pack(model: torch.nn.Module) -> None:
    """Pack every linear of a loaded model where that is possible, one after the other.

    The plain weights are given up on the way, so a packed model has no state dict.
    """
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    if not linears or not can_pack(linears[0].weight):
        return
    for joined in [module for module in model.modules() if isinstance(module, Joined)]:
        joined.backend = Packed(torch.cat([part.weight for part in joined.parts]))
        for part in joined.parts:
            linears.remove(part)
            del part.weight
    for linear in linears:
        linear.backend = Packed(linear.weight)
        del linear.weight
