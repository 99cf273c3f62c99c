"""Folders of quantized weights.

Such a folder looks like a native one, except for a key `quantization` in its `params.json`. Each file holds
some of the matrices, whole, in groups from which any rank can read its part.
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
    """The names under which a folder stores a quantized matrix's values, scales and minima."""
    stem = name.removesuffix("weight")
    return [name, f"{stem}scales", f"{stem}mins"]


class QuantizedShards:
    """The matrices of a folder of quantized weights, as a `QuantizedSource`.

    Files contain the tensors of each `QuantizedMatrix` under `keys`. Norms, and matrices whose inputs do
    not divide into groups, are not quantized.
    Raises CheckpointError if a tensor is missing, unknown, or has the wrong shape or dtype.
    """

    def __init__(self, paths: Sequence[Path], args: ModelArgs) -> None:
        self._mapped = {path: read_shard(path) for path in paths}
        self._where: dict[str, Path] = {}
        for path, tensors in self._mapped.items():
            if twice := [name for name in tensors if name in self._where]:
                raise CheckpointError(
                    f"{path} and {self._where[twice[0]].name} both contain {some(twice)}; "
                    "do all files belong to the same model?"
                )
            self._where.update(dict.fromkeys(tensors, path))
        self.shapes = {name: part.shape for name, part in whole_parts(args, self._where).items()}
        folder = paths[0].parent
        if missing := [name for name in self.shapes if name not in self._where]:
            raise CheckpointError(
                f"{folder} lacks {some(missing)} of a quantized model; is a file missing, or is params.json "
                "from another model?"
            )
        expected = {name: self._expected(name) for name in self.shapes}
        self._keys = {name: [*tensors] for name, tensors in expected.items()}
        known = {key: what for tensors in expected.values() for key, what in tensors.items()}
        if missing := [key for key in known if key not in self._where]:
            raise CheckpointError(f"{folder} lacks {some(missing)} of a quantized model; convert it again")
        if unknown := [key for key in self._where if key not in known]:
            raise CheckpointError(
                f"{folder}: unexpected {some(unknown)}: not part of the model that params.json describes"
            )
        for key, (dtype, shape) in known.items():
            tensor = self._tensor(key)
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise CheckpointError(
                    f"{self._where[key]}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, but "
                    f"params.json implies {dtype} of {shape}; do all files belong to the same model?"
                )
        self.dtype = self._tensor("norm.weight").dtype

    def bits(self, name: str) -> int | None:
        return self.matrix(name).bits if len(self._keys[name]) > 1 else None

    def matrix(self, name: str) -> QuantizedMatrix:
        return QuantizedMatrix(*map(self._tensor, self._keys[name]))

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

    def _expected(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The expected tensors of a weight, with dtype and shape, given the dtype of the first."""
        first, shape = self._tensor(name), self.shapes[name]
        if first.is_floating_point() or len(shape) == 1 or shape[1] % GROUP:
            check_float(self._where[name], name, first)
            return {name: (first.dtype, shape)}
        groups = (shape[0], shape[1] // GROUP)
        number = (torch.float16, groups)
        if first.dtype == torch.int8:
            return dict(zip(keys(name), [(torch.int8, (*groups, 32)), number], strict=False))
        size = 20 if first.shape[-1:] == (20,) else 16
        return dict(zip(keys(name), [(torch.uint8, (*groups, size)), number, number], strict=True))
