"""How a checkpoint's weights reach the ranks of a model."""

from __future__ import annotations

import torch
from tqdm import tqdm

from llama.checkpoint.source import (
    Pages,
    Part,
    QuantizedSource,
    TensorSource,
    check_finite,
    is_tied,
    stored_name,
)
from llama.model import Transformer
from llama.quantization import Weight, alike, joined, plain
from llama.vision import VisionModel


class RankReader:
    """This rank's parts of a source's tensors, by name, with a progress bar. Use it in a `with` block.

    tied: whether the embeddings also serve as the output layer.
    """

    def __init__(self, model: Transformer | VisionModel, source: TensorSource, prefix: str = "") -> None:
        """prefix: of the source's names, if `model` is part of a model."""
        self.prefix = prefix
        self.parts = {name: Part.of(model, name) for name, _ in model.named_parameters()}
        self.sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        self.tied = is_tied(source.shapes)
        self.source, self._pages = source, Pages(source)
        quiet = True if model.parallel.rank else None  # None: tqdm checks for a terminal
        total = sum(self.sizes.values())
        self._bar = tqdm(
            total=total, desc="Loading", unit=" weights", unit_scale=True, leave=False, disable=quiet
        )

    def __enter__(self) -> RankReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def read(self, name: str, quantized: bool = True) -> Weight:
        """A part; mapped from the file if possible.

        quantized: keep it as stored if it is quantized and no group is split; False always dequantizes.
        Raises CheckpointError if a value is not finite.
        """
        part, source, stored = self.parts[name], self.source, stored_name(self.source, self.prefix + name)
        if part.dim is None:
            return check_finite(stored, source.read(stored))
        if all(start == stop for start, stop in part.spans):  # more ranks than the image encoder has heads
            return torch.empty(part.resized(part.dim, 0), dtype=source.dtype)
        pieces: list[Weight]
        if quantized and isinstance(source, QuantizedSource) and source.bits(stored):
            matrix = source.matrix(stored)
            pieces = [check_finite(stored, matrix.narrow(part.dim, *span)) for span in part.spans]
        else:
            pieces = [check_finite(stored, source.read(stored, part.dim, span)) for span in part.spans]
        return joined(pieces if alike(pieces) else [plain(piece) for piece in pieces], part.dim)

    def done(self, name: str, copied: bool) -> None:
        """Advance the bar by one part. copied: whether its pages of a mapped file are no longer needed."""
        self._bar.update(self.sizes[name])
        self._pages.read(self.sizes[name] * self.source.dtype.itemsize if copied else 0)
