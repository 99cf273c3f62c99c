"""How a checkpoint's weights reach the ranks of a model."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from llama.checkpoint.source import OUTPUT, RELEASE_AFTER, Part, TensorSource, check_shapes
from llama.model import Transformer
from llama.vision import VisionModel


class RankReader:
    """This rank's parts of a source's tensors, by name, with a bar to watch.

    model: or a part of one, whose tensors' names the source has with a prefix
    release_after: bytes copied from mapped files before they are let go of
    prefix: of the source's names, that are to be read
    skip: prefixes of names that are of no part of the model

    Where the source has no `output.weight`, the embeddings serve as output too.
    Raises CheckpointError where a tensor is missing, unknown or of another shape than the model's.
    """

    def __init__(
        self,
        model: Transformer | VisionModel,
        source: TensorSource,
        release_after: int = RELEASE_AFTER,
        *,
        prefix: str = "",
        skip: tuple[str, ...] = (),
    ) -> None:
        self.parts = {name: Part.of(model, name) for name, _ in model.named_parameters()}
        shapes = {
            name.removeprefix(prefix): shape
            for name, shape in source.shapes.items()
            if name.startswith(prefix) and not name.startswith(skip)
        }
        self.tied = OUTPUT in self.parts and OUTPUT not in shapes
        check_shapes(shapes, {n: p for n, p in self.parts.items() if not self.tied or n != OUTPUT})
        self.source, self.prefix, self._release_after = source, prefix, release_after
        self._unreleased = 0
        total = sum(weight.numel() for weight in model.parameters())
        quiet = True if model.parallel.rank else None  # None: tqdm looks whether anybody watches
        self._bar = tqdm(
            total=total, desc="Loading", unit=" weights", unit_scale=True, leave=False, disable=quiet
        )

    def __enter__(self) -> RankReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def read(self, name: str) -> Tensor:
        """A part; mapped from the file where it can be."""
        part = self.parts[name]
        stored = "tok_embeddings.weight" if self.tied and name == OUTPUT else self.prefix + name
        if part.dim is None:
            return self.source.read(stored)
        pieces = [self.source.read(stored, part.dim, span) for span in part.spans]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, part.dim)

    def done(self, weights: int, copied: int) -> None:
        """Move the bar by so many weights, for which so many bytes of files were copied."""
        self._bar.update(weights)
        self._unreleased += copied
        if self._unreleased > self._release_after:
            self.source.release()
            self._unreleased = 0


def load_weights(
    model: Transformer | VisionModel,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prefix: str = "",
    skip: tuple[str, ...] = (),
) -> None:
    """Fill a model that was built on the meta device with this rank's part of every tensor.

    prefix, skip: see `RankReader`
    Where the source has no `output.weight`, the embeddings serve as output too.
    Raises CheckpointError where a tensor is missing, unknown or of another shape than the model's.
    """
    loaded: dict[str, Tensor] = {}
    with RankReader(model, source, prefix=prefix, skip=skip) as reader:
        for name in reader.parts:
            if reader.tied and name == OUTPUT:
                continue
            weight = reader.read(name)
            # No copy where nothing changes.
            loaded[name] = weight.to(device, dtype).contiguous()
            reader.done(weight.numel(), weight.nbytes if loaded[name] is not weight else 0)
    if reader.tied:
        loaded[OUTPUT] = loaded["tok_embeddings.weight"]
    model.load_state_dict(loaded, strict=True, assign=True)
    if reader.tied and isinstance(model, Transformer):
        model.output.weight = model.tok_embeddings.weight
