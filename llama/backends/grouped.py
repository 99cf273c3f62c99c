"""Quantized weights in plain operators, for devices with a compiler that fuses them.

Fused, a weight is widened in registers as it is read, so a step reads the few bits that are stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.quantization import GROUP, QuantizedMatrix

# Rows of x that are multiplied while the weight is read. For more, a wide copy is made once and multiplied.
FEW = 8


class Grouped:
    """x Wᵀ for a quantized weight, (…, in) of any float dtype to (…, out) of the same."""

    def __init__(self, weight: QuantizedMatrix) -> None:
        self.weight = weight.contiguous()
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.linear(x, self.weight.dequantize(x.dtype))
        weight = self.weight.widened()
        if x.dim() != 2 or len(x) > FEW:
            return F.linear(x, weight.flatten(1).to(x.dtype))
        # A number of rows of its own would be a variant of its own, so there are 1 or FEW.
        padded = x if len(x) == 1 else F.pad(x, (0, 0, 0, FEW - len(x)))
        rows = padded.float().unflatten(1, (-1, GROUP)).unbind()
        return torch.stack([(weight * row).sum((-1, -2)) for row in rows])[: len(x)].to(x.dtype)
