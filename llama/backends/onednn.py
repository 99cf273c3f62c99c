"""bf16 weights in oneDNN's own layout, for CPUs.

A matrix laid out for the kernel streams at memory bandwidth for a single row; a plain bf16 `F.linear`
reaches a quarter of it. The operators are private to PyTorch (Inductor uses them), so they are tried
first; if they are missing, nothing changes.
"""

import torch
from torch import Tensor


class Packed:
    """x Wᵀ for one packed weight, bf16 (…, in) to (…, out)."""

    def __init__(self, weight: Tensor) -> None:
        self.nbytes = weight.nbytes
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")

    def fused(self, x: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        """x Wᵀ + bias, then GELU if wanted, rounded to bf16 once."""
        after = "gelu" if gelu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, after, [], "none")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device, a dtype and this build of PyTorch offer the packed layout."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    try:
        Packed(torch.ones(16, 16, dtype=torch.bfloat16))(torch.ones(1, 16, dtype=torch.bfloat16))
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False
