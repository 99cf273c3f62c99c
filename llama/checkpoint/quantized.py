"""Folders of quantized weights.

Such a folder looks like a native one, but for a key `quantization` in its `params.json`, and its files
hold whole matrices: some of them each, in groups that any rank can take its part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.source import check_float, read_shard, some, whole_parts
from llama.errors import CheckpointError
from llama.model import ModelArgs
from llama.parallel import Span
from llama.quantization import GROUP, QuantizedMatrix, plain


def keys(name: str) -> list[str]:
    """Where a folder holds the values, the scales and the minima of a quantized matrix."""
    stem = name.removesuffix("weight")
    return [name, f"{stem}scales", f"{stem}mins"]


class QuantizedShards:
    """The matrices of a folder of quantized weights, as a `QuantizedSource`.

    Files hold the tensors of a `QuantizedMatrix` under `keys`. Norms are plain, and so are matrices with
    inputs that do not divide into groups.
    Raises CheckpointError if a tensor is missing, unknown, or of another shape or dtype.
    """

    def __init__(self, paths: Sequence[Path], args: ModelArgs) -> None:
        self._mapped = {path: read_shard(path) for path in paths}
        self._where: dict[str, Path] = {}
        for path, tensors in self._mapped.items():
            if twice := [name for name in tensors if name in self._where]:
                raise CheckpointError(
                    f"{path} has {some(twice)} that {self._where[twice[0]].name} has too; "
                    "do all files belong to one model?"
                )
            self._where.update(dict.fromkeys(tensors, path))
        self.shapes = {name: part.shape for name, part in whole_parts(args, self._where).items()}
        folder = paths[0].parent
        if missing := [name for name in self.shapes if name not in self._where]:
            raise CheckpointError(
                f"{folder} lacks {some(missing)} of a quantized model; is a file missing, or is params.json "
                "that of another model?"
            )
        known = {
            key for name, shape in self.shapes.items() for key in keys(name)[: 3 if groups(shape) else 1]
        }
        if unknown := [key for key in self._where if key not in known]:
            raise CheckpointError(
                f"{folder}: unexpected {some(unknown)}: not part of the model that params.json describes"
            )
        for name in self.shapes:
            self._check(name)
        self.dtype = self._tensor("norm.weight").dtype

    def bits(self, name: str) -> int | None:
        return self.matrix(name).bits if keys(name)[1] in self._where else None

    def matrix(self, name: str) -> QuantizedMatrix:
        return QuantizedMatrix(*(self._tensor(key) for key in keys(name) if key in self._where))

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        start, stop = span or (0, self.shapes[name][dim])
        if self.bits(name) is None:
            return self._tensor(name).narrow(dim, start, stop - start)
        return plain(self.matrix(name).narrow(dim, start, stop))

    def release(self) -> None:
        self._mapped = {}

    def _tensor(self, key: str) -> Tensor:
        path = self._where[key]
        if path not in self._mapped:
            self._mapped[path] = read_shard(path)
        return self._mapped[path][key]

    def _check(self, name: str) -> None:
        values, shape = self._tensor(name), self.shapes[name]
        found = [key for key in keys(name) if key in self._where]
        if len(found) == 1:
            check_float(self._where[name], name, values)
            wanted: list[tuple[torch.dtype, tuple[int, ...]]] = [(values.dtype, shape)]
        else:
            eight = values.dtype == torch.int8
            size = 32 if eight else 20 if values.shape[-1:] == (20,) else 16
            wanted = [(torch.int8 if eight else torch.uint8, (*groups(shape), size))]
            wanted += [(torch.float16, groups(shape))] * (1 if eight else 2)
        if len(found) > len(wanted) or found[1:2] == keys(name)[2:]:
            raise CheckpointError(f"{self._where[found[1]]}: {name} of {values.dtype} has no {found[-1]}")
        for key, (dtype, expected) in zip(found, wanted, strict=False):
            tensor = self._tensor(key)
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, expected):
                raise CheckpointError(
                    f"{self._where[key]}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, but "
                    f"params.json implies {dtype} of {expected}; do all files belong to one model?"
                )


def groups(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of a matrix; empty for one that does not divide into groups."""
    return (shape[0], shape[1] // GROUP) if len(shape) == 2 and shape[1] % GROUP == 0 else ()
