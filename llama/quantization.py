"""Weights in 8, 5 and 4 bits: what is stored, how it is computed, and what it means.

The inputs of every output row are split into groups of 32, each with a scale and, below 8 bits, a minimum:

    8 bits        w = scale · q          q = -127 … 127
    5 and 4 bits  w = scale · q + min    q = 0 … 31 and 0 … 15

Scale and minimum are fp16, and a group's values are laid out as in llama.cpp's Q8_0, Q5_1 and Q4_1, so a
block of a GGUF file can be used as a group directly. Embeddings and the output layer, which suffer most
from low precision, always have 8 bits. Nothing here knows about files, devices or kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"  # the weights that always have 8 bits
LEARNABLE = "learnable_embedding.weight"  # a vision model's additional embeddings
GROUP = 32  # inputs that share a scale
BITS = {"int8": 8, "int5": 5, "int4": 4}  # of a layer's matrices, by scheme
QUANTIZATIONS = tuple(BITS)  # the schemes that a folder can hold
SCHEMES = (*QUANTIZATIONS, "fp8")
LAYOUT = 2  # version of how a folder stores a `QuantizedMatrix`
GROUP_BYTES = {8: 32, 5: 20, 4: 16}
STORED_BITS = {8: 8.5, 5: 6.0, 4: 5.0}  # of a weight, at most, with its share of the scale and the minimum
CHUNK = 2**17  # weights quantized or dequantized at once, so that their fp32 copies stay in a core's cache


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (out, in) in groups of 32 inputs.

    values: (out, in / 32, bytes of a group). int8, 32 bytes, for 8 bits. uint8, 16 bytes, for 4 bits: byte j
        has input j in its low half and input j + 16 in its high half. uint8, 20 bytes, for 5 bits: 4 bytes
        of fifth bits, with input 0's lowest in the first byte, then 16 bytes as for 4 bits.
    scales: fp16 (out, in / 32).
    mins: fp16 (out, in / 32). None for 8 bits, and for values around zero: then min = -2^(bits - 1) · scale.
    """

    values: Tensor
    scales: Tensor
    mins: Tensor | None = None

    @property
    def bits(self) -> int:
        return next(bits for bits, size in GROUP_BYTES.items() if size == self.values.shape[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.values), self.values.shape[1] * GROUP

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.values, self.scales, self.mins) if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def narrow(self, dim: int, start: int, stop: int) -> Weight:
        """Rows (dim 0) or inputs (dim 1) `start` to `stop`: a view, or fp32 if that splits groups."""
        unit = GROUP if dim else 1
        first, last = start // unit, -(-stop // unit)
        whole = QuantizedMatrix(*(tensor.narrow(dim, first, last - first) for tensor in self.tensors))
        if (first * unit, last * unit) == (start, stop):
            return whole
        return whole.dequantize().narrow(dim, start - first * unit, stop - start)

    def with_mins(self) -> QuantizedMatrix:
        """The same with explicit minima, if it has fewer than 8 bits."""
        if self.bits == 8 or self.mins is not None:
            return self
        return QuantizedMatrix(self.values, self.scales, self.scales * -(2 ** (self.bits - 1)))

    def to(self, device: torch.device) -> QuantizedMatrix:
        return QuantizedMatrix(*(tensor.to(device) for tensor in self.tensors))

    def contiguous(self) -> QuantizedMatrix:
        """A copy, if this is a view of a mapped file with gaps between the groups."""
        return QuantizedMatrix(*(tensor.contiguous() for tensor in self.tensors))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in) that this represents."""
        out = torch.empty(self.shape, dtype=dtype, device=self.values.device)
        rows = rows_at_once(out)
        for part, *tensors in zip(out.split(rows), *(t.split(rows) for t in self.tensors), strict=True):
            part.copy_(QuantizedMatrix(*tensors).widened().flatten(1))
        return out

    def widened(self) -> Tensor:
        """The same as fp32 (out, in / 32, 32), all at once, with operators that a compiler fuses."""
        scales = self.scales.float()[..., None]
        mins = self.with_mins().mins
        if mins is None:
            return scales * self.values
        values = spread(self.values[..., -16:], 4).flatten(-2)
        if self.bits == 5:
            values = values | spread(self.values[..., :4], 1).transpose(-1, -2).flatten(-2) << 4
        return scales * values + mins.float()[..., None]


def spread(packed: Tensor, bits: int) -> Tensor:
    """Split bytes (…, n) into fields of `bits` bits, lowest first: (…, 8 / bits, n)."""
    places = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return packed[..., None, :] >> places[:, None] & 2**bits - 1


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 values (…, 32) of 5 or 4 bits, packed as in a `QuantizedMatrix`."""
    halves = values[..., :16] & 15 | values[..., 16:] << 4
    if bits == 4:
        return halves
    places = torch.arange(8, device=values.device, dtype=torch.uint8)
    fifths = ((values >> 4).unflatten(-1, (4, 8)) << places).sum(-1, dtype=torch.uint8)
    return torch.cat((fifths, halves), -1)


def rows_at_once(weight: Tensor) -> int:
    return max(1, (CHUNK if weight.device.type == "cpu" else 2**26) // weight.shape[1])


Weight: TypeAlias = Tensor | QuantizedMatrix  # (out, in)


def alike(weights: Sequence[Weight]) -> bool:
    """Whether weights can be `joined` directly."""
    return len({(w.bits, w.mins is None) if isinstance(w, QuantizedMatrix) else None for w in weights}) == 1


def joined(weights: Sequence[Weight], dim: int = 0) -> Weight:
    """Weights that are `alike`, concatenated by rows (dim 0) or inputs (dim 1)."""
    if len(weights) == 1:
        return weights[0]
    parts = zip(*(w.tensors if isinstance(w, QuantizedMatrix) else [w] for w in weights), strict=True)
    tensors = [torch.cat(tensors, dim) for tensors in parts]
    return QuantizedMatrix(*tensors) if isinstance(weights[0], QuantizedMatrix) else tensors[0]


def plain(weight: Weight) -> Tensor:
    """A weight as a tensor: itself, or dequantized to fp32."""
    return weight.dequantize() if isinstance(weight, QuantizedMatrix) else weight


def few_bits(scheme: str | None, name: str) -> int | None:
    """The bits that a scheme gives a weight, by its name; None if it leaves the weight unquantized."""
    if scheme not in BITS or not name.endswith(".weight"):  # others are not matrices: biases, positions
        return None
    return 8 if name in (EMBEDDINGS, OUTPUT, LEARNABLE) else BITS[scheme]
