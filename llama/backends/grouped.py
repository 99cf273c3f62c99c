"""Quantized weights with plain operators, for devices with a compiler that fuses them.

When fused, a weight is widened in registers as it is read, so a step reads only the bits that are stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.quantization import GROUP, QuantizedMatrix

# Maximum rows of x to multiply while the weight is read. For more, a wide copy is made once.
FEW = 8


class Grouped:
    """x Wᵀ for a quantized weight, (…, in) to (…, out) in the same float dtype."""

    def __init__(self, weight: QuantizedMatrix) -> None:
        self.weight = weight.contiguous()
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.linear(x, self.weight.dequantize(x.dtype))
        weight = self.weight.widened()
        if x.dim() != 2 or len(x) > FEW:
            return F.linear(x, weight.flatten(1).to(x.dtype))
        # Every number of rows would compile another variant, so use only 1 and FEW.
        padded = x if len(x) == 1 else F.pad(x, (0, 0, 0, FEW - len(x)))
        rows = padded.float().unflatten(1, (-1, GROUP)).unbind()
        return torch.stack([(weight * row).sum((-1, -2)) for row in rows])[: len(x)].to(x.dtype)
