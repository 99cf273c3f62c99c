"""Linear layers with weights of 8 or 4 bits, for CPUs of the x86 kind, and for CUDA.

8 bits: weights int8 with a scale for each output row, activations int8 with a scale for each token.
A few channels of the residual stream are so much larger than the others that 8 bits do not resolve
both, so it is turned by an orthogonal matrix first, which spreads them and changes nothing else: all
weights that read it or write to it are turned alike (Ashkboos et al. 2024, QuaRot, section 4). The
input of `w2`, a product of two activations, cannot be turned; it goes in as a high and a low part of
8 bits each.

4 bits: groups of 32 weights of a row with a scale and a zero point, chosen by least squares. The output
layer, and in small models `w2`, which suffer most, stay at 8 bits, and embeddings are rounded to 8.

Norms, and with int8 the embeddings, keep their dtype. The operators are PyTorch's own. On CUDA
(`torchao_backend`) the same weights meet activations as they are, so there int8 needs no turning;
turned weights from a folder serve as well, for the model they make is the same.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llama.parallel import Linear, matrices

EMBEDDINGS = "tok_embeddings.weight"
QUANTIZATIONS = ("int8", "int4")  # that a folder can hold
GROUP = 32  # weights of 4 bits that share a scale and a zero point of bf16, which makes 5 bits a weight
SCHEMES = (*QUANTIZATIONS, "fp8")
Stored = tuple[Tensor, ...]  # a matrix of 8 or 4 bits, as `QuantizedShards` has it
# An activation is so many steps at most to either side. Without VNNI instructions the kernel adds pairs
# of products in 16 bits, which only 7 bits of activations cannot overflow.
STEPS = 127 if getattr(torch.cpu, "_is_vnni_supported", bool)() else 63
# Numbers of a matrix that are copied to fp32 at once, and columns of one that are turned at once.
COPIED, TURNED = 2**24, 1024
LARGE = 4096  # dim from which on w2 too has 4 bits: what a small model loses by that is more than it saves
# Clipping of a group's range that is tried, and weights that are searched for at once: as many as
# stay in a core's cache.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
SEARCHED = 2**18
# Linears that write to the residual stream (all others read it), norms that read it, and linears whose
# input has passed no norm: the end of a feed-forward, and the projection of image features.
WRITERS = ("wo.weight", "w2.weight")
GAINS = ("attention_norm.weight", "ffn_norm.weight")  # besides the last one, norm.weight
UNNORMED = ("w2", "c_proj", "vision_projection")


def backend(name: str, stored: Stored) -> Callable[[Tensor], Tensor]:
    """The operator of an x86 CPU for a matrix as it is stored."""
    if len(stored) == 3:
        return Int4((unpacked(stored[0]).to(torch.int32), *stored[1:]))
    return Int8((stored[0], stored[1]), split=name.endswith(UNNORMED))


def four_bits(model: torch.nn.Module, scheme: str) -> set[str]:
    """Names of the weights that take 4 bits. Those that are applied as one do so together."""
    found: set[str] = set()
    for name, _, parts in matrices(model) if scheme == "int4" else ():
        shapes = [part.weight.shape for part in parts.values()]
        whole = torch.empty(sum(rows for rows, _ in shapes), shapes[0][1], device="meta")
        if takes_int4(name, whole):
            found |= parts.keys()
    return found


def reads_images(name: str) -> bool:
    """Whether a weight reads pixels or features of images, in a vision model, not the residual stream."""
    return re.match(r"vision_model\.|cross_attention_layers\.\d+\.attention\.w[kv]\.", name) is not None


class Quantizer:
    """A model's weights into those that are stored, one by one, by their names.

    read: gives the norms by name. turns: the residual stream, as int8 of x86 CPUs wants it.
    """

    def __init__(
        self, scheme: str, dim: int, read: Callable[[str], Tensor], turns: bool | None = None
    ) -> None:
        self.scheme = scheme
        self.rotation = Rotation(dim) if (scheme == "int8" if turns is None else turns) else None
        self.read = read

    def matrix(self, name: str, weight: Tensor, four: bool) -> Stored:
        """A weight (out, in) in 4 bits or in 8, a few rows at a time, so that fp32 copies are small."""
        if four:
            values, scales, zeros = int4_groups(weight)
            pairs = values.to(torch.uint8)
            return pairs[:, ::2] | pairs[:, 1::2] << 4, scales, zeros
        if self.rotation is not None and name.endswith(WRITERS) and not reads_images(name):
            parts = [self.rotation(part.T.contiguous().float()).T for part in weight.split(TURNED, 1)]
            weight = torch.cat(parts, 1)
            del parts
        rows = max(1, COPIED // weight.shape[1])
        quantized = [int8_rows(self._turned(name, part)) for part in weight.split(rows)]
        return tuple(map(torch.cat, zip(*quantized, strict=True)))

    def _turned(self, name: str, rows: Tensor) -> Tensor:
        if self.rotation is None or name.endswith(WRITERS) or reads_images(name):
            return rows
        layer, _, part = name.removesuffix(".weight").rpartition(".")[0].rpartition(".")
        gain = {"": "norm", "attention": f"{layer}.attention_norm", "feed_forward": f"{layer}.ffn_norm"}[part]
        return self.rotation(rows.float() * self.read(f"{gain}.weight"))

    def narrows(self, name: str) -> bool:
        """Whether a weight that is no linear's is stored in 8 bits too."""
        return self.scheme == "int4" and name == EMBEDDINGS

    def other(self, name: str, weight: Tensor) -> Tensor:
        """What belongs to no linear, in the dtype that it has; itself where nothing changes."""
        if self.narrows(name):
            values, scales = self.matrix(name, weight, False)
            return widened(values, scales, weight.dtype)
        if self.rotation is None:
            return weight
        if name == "norm.weight" or name.endswith(GAINS):
            # It differs from channel to channel, and went into the weights that follow.
            return torch.ones_like(weight)
        if name not in (EMBEDDINGS, "learnable_embedding.weight"):
            return weight
        turned = torch.empty_like(weight)
        for rows, to in zip(weight.split(4096), turned.split(4096), strict=True):
            to.copy_(self.rotation(rows.float()))
        return turned


class Rotation:
    """x (…, dim) times an orthogonal matrix, whose entries are 2 / sqrt(dim) at most.

    It is the Kronecker product of two small ones: Hartley transforms with signs at random, which are
    almost as flat as Hadamard matrices and exist in every size (Bracewell 1983).
    """

    def __init__(self, dim: int) -> None:
        rows = max(n for n in range(1, math.isqrt(dim) + 1) if dim % n == 0)
        generator = torch.Generator().manual_seed(0)  # every rank turns alike
        self.left, self.right = (
            (hartley(n) * (2 * torch.randint(2, (n, 1), generator=generator) - 1)).float()
            for n in (rows, dim // rows)
        )

    def __call__(self, x: Tensor) -> Tensor:
        return (self.left.T @ x.unflatten(-1, (len(self.left), len(self.right))) @ self.right).flatten(-2)


def hartley(n: int) -> Tensor:
    """(cos + sin)(2πjk / n) / sqrt(n) for j, k = 0 … n - 1: orthogonal, fp64."""
    k = torch.arange(n, dtype=torch.float64)
    angles = torch.outer(k, k).remainder(n) * (2 * math.pi / n)
    return (angles.cos() + angles.sin()) / math.sqrt(n)


def takes_int4(name: str, weight: Tensor) -> bool:
    """Whether a linear is among those that bear 4 bits, and its weight (out, in) has sizes for them."""
    rows, columns = weight.shape
    if name.endswith("output") or (name.endswith("w2") and rows < LARGE):
        return False
    return rows % 16 == 0 and columns % GROUP == 0


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

    weight: (out, in), or its `int8_rows`. split: whether x goes in as a high and a low part.
    """

    def __init__(self, weight: Tensor | tuple[Tensor, Tensor], split: bool = False) -> None:
        weights, scales = int8_rows(weight) if isinstance(weight, Tensor) else weight
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with quantized_engine("fbgemm"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a later PyTorch may drop quantized tensors
            quantized = torch._make_per_channel_quantized_tensor(weights, scales.double(), zeros, 0)
            self.weight = torch.ops.quantized.linear_prepack(quantized, None)
        self.split = split

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # packed weights are opaque to it
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
    """x Wᵀ with a weight of 4 bits, (…, in) of any float dtype, computed in bf16, to (…, out).

    weight: (out, in), or its `int4_groups`.
    """

    def __init__(self, weight: Tensor | tuple[Tensor, Tensor, Tensor]) -> None:
        values, scales, zeros = int4_groups(weight) if isinstance(weight, Tensor) else weight
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 2)
        self.scales_and_zeros = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # packed weights are opaque to it
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


def unpacked(weight: Tensor) -> Tensor:
    """uint8 (out, in / 2), two values of 4 bits to a byte, to uint8 (out, in)."""
    return torch.stack((weight & 15, weight >> 4), -1).flatten(1)


def dequantized(stored: Sequence[Tensor]) -> Tensor:
    """fp32 (out, in) of a stored matrix, as `QuantizedShards` has them."""
    weight, scales, *zeros = stored
    if not zeros:
        return weight * scales[:, None]
    groups = unpacked(weight).unflatten(1, (-1, GROUP)).float() - 8
    return groups.mul_(scales[..., None].float()).add_(zeros[0][..., None].float()).flatten(1)


def widened(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantized` int8 rows, a few at a time, so that no large fp32 copy is made."""
    wide = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows, scale, to in zip(*(tensor.split(4096) for tensor in (weight, scales, wide)), strict=True):
        to.copy_(dequantized((rows, scale)))
    return wide
