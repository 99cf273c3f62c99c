"""The search for the scales and values that represent a matrix in few bits with the least error."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from llama.quantization import GROUP, GROUP_BYTES, QuantizedMatrix, Weight, pack, plain, rows_at_once

CLIPS = (1.0, 0.95)  # parts of a group's range, above and below its middle, that a search begins with
# Compiled code for `search_in_chunks`, by type of device; a backend that has some adds it.
SEARCHES: dict[str, Callable[[Tensor, QuantizedMatrix, Tensor | None], None]] = {}


def quantize(weight: Weight, bits: int | None, importance: Tensor | None = None) -> Weight:
    """A matrix (out, in) in 8, 5 or 4 bits; unchanged if it has as few already or does not fit into groups.

    bits: None leaves the matrix unchanged.
    importance: (in) how much a squared error in each input's weights counts; by default all count the same.
    """
    if bits is None or (isinstance(weight, QuantizedMatrix) and weight.bits <= bits):
        return weight
    weight = plain(weight).detach()
    if weight.dim() < 2 or weight.shape[1] % GROUP:
        return weight
    shape, kind = (len(weight), weight.shape[1] // GROUP), torch.int8 if bits == 8 else torch.uint8
    numbers = (weight.new_empty(shape, dtype=torch.float16) for _ in range(1 if bits == 8 else 2))
    found = QuantizedMatrix(weight.new_empty(*shape, GROUP_BYTES[bits], dtype=kind), *numbers)
    SEARCHES.get(weight.device.type, search_in_chunks)(weight, found, importance)
    return found


def search_in_chunks(weight: Tensor, found: QuantizedMatrix, importance: Tensor | None) -> None:
    """Fill a quantized matrix with what fits a weight best."""
    bits = found.bits
    rows = rows_at_once(weight)
    for part, *tensors in zip(weight.split(rows), *(t.split(rows) for t in found.tensors), strict=True):
        # Transposed, so that a sum over a group is a sum of long vectors.
        groups = part.float().reshape(-1, GROUP).T.contiguous()
        counts = None if importance is None else importance.float().view(-1, GROUP).T.repeat(1, len(part))
        q, *fitted = fit(groups, bits, counts)
        packed = q.T.to(torch.int8) if bits == 8 else pack(q.T.to(torch.uint8), bits)
        for tensor, new in zip(tensors, (packed, *fitted), strict=False):
            tensor.copy_(new.view_as(tensor))


def fit(w: Tensor, bits: int, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The values of groups (32, n), and their scales and minima (n), by weighted least squares.

    counts: (32, n) how much each squared error counts; errors of larger weights also count more.
    Given the values, the best scale and minimum are those of a linear regression; given these, the best
    values are the nearest ones. Alternating finds only the next optimum, so it starts from several ranges.
    """
    least, most, shifted = (-127, 127, 0) if bits == 8 else (0, 2**bits - 1, 1)  # 8 bits have no minimum
    low, high = w.aminmax(dim=0) if shifted else (-w.abs().amax(0), w.abs().amax(0))
    middle, reach = (low + high) / 2, (high - low) / 2

    def nearest(scale: Tensor, low: Tensor) -> Tensor:
        return (w - low).mul_(1 / scale).round_().clamp_(least, most)

    def regress(scale: Tensor, low: Tensor) -> tuple[Tensor, ...]:
        """The variance explained by the nearest values, and the scale and minimum for this."""
        q = nearest(scale, low)
        q -= (mean_q := (share * q).sum(0) * shifted)
        covariance, variance = (centred * q).sum(0), (share * q).mul_(q).sum(0)
        scale = torch.where(variance > 1e-6, covariance / variance, scale).clamp_(min=1e-7).half().float()
        return scale * (2 * covariance - scale * variance), scale, mean - scale * mean_q

    best: tuple[Tensor, ...] = (middle, (reach / most).clamp_(min=1e-7), middle)
    if shifted or counts is not None:  # otherwise the whole range is as good
        squares = w.square()
        share = (squares + squares.mean(0)).sqrt_().mul_(1 if counts is None else counts).add_(1e-20)
        share /= share.sum(0)
        mean = (share * w).sum(0) * shifted
        centred = share * (w - mean)
        starts = [
            ((reach * (below + above) / (most - least)).clamp_(min=1e-7), (middle - reach * below) * shifted)
            for below, above in itertools.product(CLIPS, repeat=2)
        ]
        best = regress(*starts[0])
        for start in (*starts[1:], None, None):
            found = regress(*(start or best[1:]))
            better = found[0] > best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    scale, low = (number.half() for number in best[1:])
    return nearest(scale.float(), low.float()), scale, low
