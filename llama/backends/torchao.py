"""fp8 on CUDA, with torchao's tensors: one scale per row of a weight and per token's activations."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.errors import ArgumentError, MissingPackageError

CAPABILITY = (8, 9)  # the lowest with fp8


def check_float8(device: torch.device) -> None:
    """Raise ArgumentError if a device cannot compute in fp8, MissingPackageError if torchao is missing."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ArgumentError(
            f"quantize='fp8' needs a CUDA device, not {device.type}: use 'int8' or 'int4' instead"
        )
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise ArgumentError(
            f"quantize='fp8' needs a CUDA device of compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, "
            f"but this one has {found[0]}.{found[1]}: use 'int8' or 'int4' instead"
        )
    if find_spec("torchao") is None:
        raise MissingPackageError(
            "quantize='fp8' needs the torchao package: pip install -c constraints.txt -e '.[quant]'"
        )


class Float8:
    """x Wᵀ for a plain weight (out, in) rounded to fp8, (…, in) to (…, out) in the same float dtype.

    Uses bf16 instead if a side of the weight is not a multiple of 16.
    """

    def __init__(self, weight: Tensor) -> None:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        # Inductor's settings are global to the program, so a library must not change them.
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        quantize_(linear, config)
        self.weight, self.nbytes = linear.weight, weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight).to(x.dtype)
