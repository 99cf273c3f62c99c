"""Linear layers with weights of 8 or 4 bits, for CPUs of the x86 kind.

8 bits: weights int8 with a scale for each output row, activations int8 with a scale for each token.
A few channels of the residual stream are so much larger than the others that 8 bits do not resolve
both, so it is turned by an orthogonal matrix first, which spreads them and changes nothing else: all
weights that read it or write to it are turned alike (Ashkboos et al. 2024, QuaRot, section 4). The
input of `w2`, a product of two activations, cannot be turned; it goes in as a high and a low part of
8 bits each.

4 bits: groups of 32 weights of a row with a scale and a zero point, chosen by least squares; `w2` and
the output layer, which suffer most, stay at 8 bits.

Embeddings and norms keep their dtype. The operators are PyTorch's own.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llama.model import RMSNorm, Transformer
from llama.packing import replace_weights
from llama.parallel import Linear

SCHEMES = ("int8", "int4")
GROUP = 32  # weights of 4 bits that share a scale and a zero point of bf16, which makes 5 bits a weight
# An activation is so many steps at most to either side. Without VNNI instructions the kernel adds pairs
# of products in 16 bits, which only 7 bits of activations cannot overflow.
STEPS = 127 if getattr(torch.cpu, "_is_vnni_supported", bool)() else 63
# Clipping of a group's range that is tried, and weights that are searched for at once: as many as
# stay in a core's cache.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
SEARCHED = 2**18


def check_quantize(scheme: str | None, device: torch.device) -> None:
    """Raise ValueError for a scheme that is not None, "int8" or "int4", or that the device has not."""
    if scheme is None:
        return
    if scheme not in SCHEMES:
        raise ValueError(f"quantize must be None, 'int8' or 'int4', not {scheme!r}")
    if device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError(
            f"quantize={scheme!r} runs on x86 CPUs only, not on this {device.type} device: "
            "leave it out, or pass device='cpu'"
        )


def quantize(model: Transformer, scheme: str) -> None:
    """Quantize every linear of a loaded model, one after the other; it has no state dict afterwards."""
    rotation = Rotation(model.params.dim)

    def backend(name: str, weight: Tensor) -> Callable[[Tensor], Tensor]:
        if scheme == "int8":
            weight = rotated(name, weight.float())
        if scheme == "int4" and takes_int4(name, weight):
            return Int4(weight)
        return Int8(weight, split=name.endswith("w2"))

    def rotated(name: str, weight: Tensor) -> Tensor:
        if name.endswith(("wo", "w2")):  # these write to the residual stream, all others read it
            return rotation(weight.T).T
        layer, _, part = name.rpartition(".")[0].rpartition(".")
        gain = {"": "norm", "attention": f"{layer}.attention_norm", "feed_forward": f"{layer}.ffn_norm"}[part]
        return rotation(weight * model.get_parameter(f"{gain}.weight"))

    replace_weights(model, backend)
    if scheme == "int8":
        embeddings = model.tok_embeddings.weight
        rows = [rotation(part.float()).to(embeddings.dtype) for part in embeddings.split(4096)]
        model.tok_embeddings.weight = torch.nn.Parameter(torch.cat(rows), requires_grad=False)
        for norm in [module for module in model.modules() if isinstance(module, RMSNorm)]:
            # Its gain, which differs from channel to channel, went into the weights that follow.
            norm.weight = torch.nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)


class Rotation:
    """x (…, dim) times an orthogonal matrix, the Kronecker product of two small random ones."""

    def __init__(self, dim: int) -> None:
        rows = max(n for n in range(1, math.isqrt(dim) + 1) if dim % n == 0)
        generator = torch.Generator().manual_seed(0)  # every rank turns alike
        self.left, self.right = (
            torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0].float()
            for n in (rows, dim // rows)
        )

    def __call__(self, x: Tensor) -> Tensor:
        return (self.left.T @ x.unflatten(-1, (len(self.left), len(self.right))) @ self.right).flatten(-2)


def takes_int4(name: str, weight: Tensor) -> bool:
    """Whether a linear is among those that bear 4 bits, and its weight (out, in) has sizes for them."""
    rows, columns = weight.shape
    return not name.endswith(("w2", "output")) and rows % 16 == 0 and columns % GROUP == 0


def weight_bytes(model: torch.nn.Module, dtype: torch.dtype, scheme: str | None) -> int:
    """Memory that the weights of a model will take, which may be on the meta device still."""
    names = {module.weight: name for name, module in model.named_modules() if isinstance(module, Linear)}
    total = 0
    for weight in model.parameters():
        bits = dtype.itemsize * 8
        if scheme and weight in names:
            bits = 5 if scheme == "int4" and takes_int4(names[weight], weight) else 8
        total += weight.numel() * bits // 8
    return total


class Int8:
    """x Wᵀ in int8, (…, in) of any float dtype to (…, out) of the same.

    weight: (out, in). split: whether x goes in as a high and a low part.
    """

    def __init__(self, weight: Tensor, split: bool = False) -> None:
        weights, scales = int8_rows(weight)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with quantized_engine("fbgemm"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a later PyTorch may drop quantized tensors
            quantized = torch._make_per_channel_quantized_tensor(weights, scales.double(), zeros, 0)
            self.weight = torch.ops.quantized.linear_prepack(quantized, None)
        self.split = split

    def __call__(self, x: Tensor) -> Tensor:
        # Divided by its own largest value, every token has the same range, so that the operator's
        # one scale for all of x is each token's own, and no token depends on the others.
        largest = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12)
        rows = x / largest
        if not self.split:
            return self._product(rows).mul_(largest).to(x.dtype)
        high = rows.mul(STEPS).round_().div_(STEPS)
        low = (rows - high).mul_(2 * STEPS)  # from half a step at most to the range of a row
        high, low = self._product(torch.stack((high, low))).unbind()
        return high.add_(low, alpha=1 / (2 * STEPS)).mul_(largest).to(x.dtype)

    def _product(self, rows: Tensor) -> Tensor:
        """fp32 rows with values in [-1, 1], rounded to steps, times the weight."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows, 1 / STEPS, STEPS + 1, self.weight
        )


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (out, in) and fp32 scales (out) whose product is closest to a weight."""
    weight = weight.detach().float()
    scales = weight.abs().amax(1).clamp_(min=1e-12) / 127
    return (weight / scales[:, None]).round_().to(torch.int8), scales


@contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """Choose the library of PyTorch's quantized operators for a block: packing asks a global for it."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


class Int4:
    """x Wᵀ with a weight of 4 bits, (…, in) of any float dtype, computed in bf16, to (…, out)."""

    def __init__(self, weight: Tensor) -> None:
        values, scales, zeros = int4_groups(weight)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 2)
        self.scales_and_zeros = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.bfloat16().reshape(-1, x.shape[-1])
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scales_and_zeros)
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def int4_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int32 values 0 … 15 (out, in), bf16 scales and zeros (out, in / 32): (value - 8) · scale + zero."""
    rows = max(1, SEARCHED // weight.shape[1])
    parts = [_search_groups(part.unflatten(1, (-1, GROUP)).float()) for part in weight.detach().split(rows)]
    values, scales, zeros = map(torch.cat, zip(*parts, strict=True))
    return values.flatten(1), scales, zeros


def _search_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`int4_groups` of weight (out, groups, 32), by the least square error over a few clippings."""
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    mean, middle = weight.mean(-1, keepdim=True), (low + high) / 2
    best = torch.full_like(mean, torch.inf)
    found: tuple[Tensor, ...] = ()
    for clip in CLIPS:
        scale = bf16((high - low) * (clip / 15)).clamp_(min=1e-12)
        values = ((weight - bf16(middle + scale / 2)) / scale).round_().clamp_(-8, 7)
        # These values given, the best scale and zero point are those of a linear regression.
        centred = values - values.mean(-1, keepdim=True)
        slope = (centred * (weight - mean)).sum(-1, keepdim=True) / centred.square_().sum(-1, keepdim=True)
        scale = torch.where(slope > 0, bf16(slope), scale)
        zero = bf16(mean - scale * values.mean(-1, keepdim=True))
        values = ((weight - zero) / scale).round_().clamp_(-8, 7)
        error = (values * scale + zero - weight).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        new = (values, scale, zero)
        found = tuple(torch.where(better, n, f) for n, f in zip(new, found, strict=True)) if found else new
    values, scale, zero = found
    return values.add_(8).to(torch.int32), scale[..., 0].bfloat16(), zero[..., 0].bfloat16()


def bf16(x: Tensor) -> Tensor:
    """Rounded to bf16, as fp32."""
    return x.bfloat16().float()
