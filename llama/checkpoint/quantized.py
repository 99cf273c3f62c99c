"""Folders of quantized weights.

Such a folder looks like a native one, but for a key `quantization` in its `params.json`, and its files
hold whole matrices: some of them each, in numbers that any rank can take its part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.source import EMBEDDINGS, check_float, read_shard, some, whole_parts
from llama.errors import CheckpointError
from llama.model import ModelArgs
from llama.parallel import Span
from llama.quantization import GROUP, dequantized, widened


class QuantizedShards:
    """The matrices of a folder of quantized weights, as they are stored, and as a `TensorSource`.

    Of a matrix (out, in) the files hold either `weight` int8 and `scales` fp32 (out), or `weight` uint8
    (out, in / 2), two weights to a byte, the even column in the low half, with `scales` and `zeros` bf16
    (out, in / 32): scale · (value - 8) + zero. Norms are plain; embeddings are that or int8.
    Raises CheckpointError where a tensor is missing, unknown, or of another shape or dtype.
    """

    def __init__(self, paths: Sequence[Path], args: ModelArgs) -> None:
        self.parts = whole_parts(args)
        self.shapes = {name: part.shape for name, part in self.parts.items()}
        self._mapped = {path: read_shard(path) for path in paths}
        self._where: dict[str, Path] = {}
        for path, tensors in self._mapped.items():
            if twice := [name for name in tensors if name in self._where]:
                raise CheckpointError(
                    f"{path} has {some(twice)} that {self._where[twice[0]].name} has too; "
                    "do all files belong to one model?"
                )
            self._where.update(dict.fromkeys(tensors, path))
        folder = paths[0].parent
        wanted = {key: name for name in self.parts for key in self._keys(name)}
        if missing := [key for key in wanted if key not in self._where]:
            raise CheckpointError(
                f"{folder} lacks {some(missing)} of a quantized model; is a file of it missing, or is "
                "params.json that of another model?"
            )
        if unknown := [key for key in self._where if key not in wanted]:
            raise CheckpointError(f"{folder} has {some(unknown)}, which the model of params.json has not")
        for name in self.parts:
            self._check(name)
        self.dtype = self._tensor("norm.weight").dtype

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        start, stop = span or (0, self.shapes[name][dim])
        if len(self._keys(name)) == 1:
            return self._tensor(name).narrow(dim, start, stop - start)
        if name == EMBEDDINGS:
            stored = self.stored(name, dim, (start, stop))
            assert stored is not None
            return widened(stored[0], stored[1], self.dtype)
        # Of groups that the span cuts, all of it.
        first, last = (start, stop) if dim == 0 else (start // GROUP * GROUP, -(-stop // GROUP) * GROUP)
        stored = self.stored(name, dim, (first, min(last, self.shapes[name][dim])))
        assert stored is not None
        return dequantized(stored).narrow(dim, start - first, stop - start)

    def stored(self, name: str, dim: int, span: Span) -> tuple[Tensor, ...] | None:
        """A matrix's rows or columns as they are stored: weight and scales, and with 4 bits zeros.

        None where the span cuts a group of columns.
        """
        start, stop = span
        weight, *others = (self._tensor(key) for key in self._keys(name))
        if dim == 0:
            return tuple(tensor[start:stop] for tensor in (weight, *others))
        if len(others) == 1:  # columns share the scales of their rows
            return weight[:, start:stop], *others
        if start % GROUP or stop % GROUP:
            return None
        groups = slice(start // GROUP, stop // GROUP)
        return weight[:, start // 2 : stop // 2], *(tensor[:, groups] for tensor in others)

    def release(self) -> None:
        self._mapped = {}

    def _keys(self, name: str) -> list[str]:
        """Names of what is stored of a tensor: of a matrix at least weight and scales."""
        stem = name.removesuffix("weight")
        part = self.parts[name]
        if part.dim is None or len(part.shape) == 1 or name == "learnable_embedding.weight":
            return [name]
        if name == EMBEDDINGS and not (name in self._where and self._tensor(name).dtype == torch.int8):
            return [name]
        four = self.shapes[name][1] % GROUP == 0 and name in self._where
        four = four and self._tensor(name).dtype == torch.uint8
        return [name, f"{stem}scales", *([f"{stem}zeros"] if four else [])]

    def _tensor(self, key: str) -> Tensor:
        path = self._where[key]
        if path not in self._mapped:
            self._mapped[path] = read_shard(path)
        return self._mapped[path][key]

    def _check(self, name: str) -> None:
        keys, shape = self._keys(name), self.shapes[name]
        wanted: list[tuple[torch.dtype, tuple[int, ...]]]
        if len(keys) == 1:
            check_float(self._where[name], name, self._tensor(name))
            wanted = [(self._tensor(name).dtype, shape)]
        elif len(keys) == 2:
            wanted = [(torch.int8, shape), (torch.float32, shape[:1])]
        else:
            group = (torch.bfloat16, (shape[0], shape[1] // GROUP))
            wanted = [(torch.uint8, (shape[0], shape[1] // 2)), group, group]
        for key, (dtype, size) in zip(keys, wanted, strict=True):
            if ((tensor := self._tensor(key)).dtype, tuple(tensor.shape)) != (dtype, size):
                raise CheckpointError(
                    f"{self._where[key]}: {key} is {tensor.dtype} of {tuple(tensor.shape)}, where by "
                    f"params.json {dtype} of {size} belongs; do all files belong to one model?"
                )
