"""Quantized weights on CUDA, as torchao's tensors behind the one linear seam.

Weights of 8 and 4 bits are this package's own (`quantization`), so that they are the same on every device
and in every file; torchao knows the layouts that CUDA wants, and the operators, also for `torch.compile`.
fp8 is torchao's altogether: weights with a scale for each row, activations with a scale for each token.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.errors import ArgumentError, MissingPackageError
from llama.quantization import GROUP, unpacked

# The least compute capability that a scheme's operators run on.
CAPABILITIES = {"int8": (0, 0), "int4": (8, 0), "fp8": (8, 9)}


def check_torchao(scheme: str, device: torch.device) -> None:
    """Raise ValueError where a CUDA device does not have a scheme, ImportError where torchao is missing."""
    if not torch.cuda.is_available():
        raise ArgumentError(
            f"quantize={scheme!r} on cuda: PyTorch finds no CUDA device here; pass device='cpu'"
        )
    found, least = torch.cuda.get_device_capability(device), CAPABILITIES[scheme]
    if found < least:
        can = [repr(other) for other, capability in CAPABILITIES.items() if capability <= found]
        raise ArgumentError(
            f"quantize={scheme!r} needs a CUDA device of compute capability {least[0]}.{least[1]} or more, "
            f"and this one has {found[0]}.{found[1]}: {' and '.join(can)} can run here"
        )
    if find_spec("torchao") is None:
        raise MissingPackageError(
            f"quantize={scheme!r} on CUDA needs the torchao package: "
            "pip install -c constraints.txt -e '.[quant]'"
        )


class TorchAO:
    """x Wᵀ for a weight of torchao's, (…, in) of any float dtype to (…, out) of the same.

    dtype: that the operator computes in; None for that of x. stored: the same weight in 8 bits with a scale
    for each row, which a compiler multiplies a single row of x with as it is read, where torchao's operator
    makes a wide copy of it first.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype | None = None, stored: Sequence[Tensor] = ()
    ) -> None:
        self.weight, self.dtype, self.stored = weight, dtype, stored

    def __call__(self, x: Tensor) -> Tensor:
        if self.stored and torch.compiler.is_compiling() and len(x) == 1:
            weight, scales = self.stored
            return ((weight * x.float()).sum(-1) * scales).to(x.dtype)[None]
        return F.linear(x.to(self.dtype or x.dtype), self.weight).to(x.dtype)


def from_stored(stored: Sequence[Tensor], dtype: torch.dtype) -> TorchAO:
    """A matrix of 8 or 4 bits, as `QuantizedShards` has it, on the device that it lies on."""
    from torchao.quantization import Int8Tensor

    if len(stored) == 2:
        weight, scales = stored
        columns = weight.shape[1]
        # The operator scales what it has summed up, which fp16 might not hold.
        computed = torch.float32 if dtype == torch.float16 else dtype
        tensor = Int8Tensor(weight.contiguous(), scales[:, None], [1, columns], computed)
        return TorchAO(tensor, computed, (weight, scales))
    from torchao.quantization import Int4TilePackedTo4dTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    weight, scales, zeros = stored
    rows, columns = weight.shape[0], weight.shape[1] * 2
    # As torchao pads them: the kernel takes tiles of 8 rows and 1024 columns.
    below, right = -rows % 8, -columns % 1024
    values = F.pad(unpacked(weight), (0, right, 0, below))
    scales, zeros = (F.pad(tensor, (0, right // GROUP, 0, below)) for tensor in (scales, zeros))
    pairs = values[:, ::2] << 4 | values[:, 1::2]  # here the even column is the high half
    tensor = Int4TilePackedTo4dTensor(
        torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8),
        pack_tinygemm_scales_and_zeros(scales, zeros, scales.dtype),
        [1, GROUP],
        torch.Size((rows, columns)),
    )
    return TorchAO(tensor, torch.bfloat16)


def float8(weight: Tensor) -> TorchAO:
    """A plain matrix (out, in) in 8 bits with an exponent; in bf16 where a side is no multiple of 16."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    # Inductor's settings are whole programs', and not for a library to change.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(linear, config)
    return TorchAO(linear.weight, torch.bfloat16)
