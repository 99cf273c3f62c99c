"""Meta's native checkpoints: find, check, and load any number of shards onto any number of ranks.

A checkpoint is a folder of `consolidated.NN.pth` and `params.json`. Each file holds the n-th part of
every matrix, cut along the dimension that the parallel layer has too; norms lie whole in each file.
Where a rank needs exactly what a file holds, the memory-mapped tensor becomes the weight itself and
nothing is copied; otherwise files are read one after the other, so that one shard at a time is in
memory beside the model.
"""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama.model import ModelArgs, Transformer
from llama.parallel import Sharded, Span

IGNORED = {"rope.freqs"}  # LLaMA 1 and 2 saved this table, which follows from params.json


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or not what its params.json says."""


def read_params(ckpt_dir: Path) -> dict[str, Any]:
    """The `params.json` of a checkpoint, as arguments for `ModelArgs`.

    Raises FileNotFoundError where there is none, CheckpointError where it is not a model's.
    """
    if not ckpt_dir.is_dir():
        raise FileNotFoundError(f"no folder {ckpt_dir}: give the path of a downloaded checkpoint as ckpt_dir")
    path = ckpt_dir / "params.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no params.json in {ckpt_dir}: is this a folder with a native Llama checkpoint?"
        )
    try:
        params = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(params, dict) or not {"dim", "n_layers", "n_heads"} <= params.keys():
        raise CheckpointError(f"{path} lacks dim, n_layers or n_heads; download it again")
    known = {field.name for field in fields(ModelArgs)}
    if unknown := sorted(params.keys() - known):
        raise CheckpointError(f"{path} has {', '.join(unknown)}, which this model does not implement")
    # LLaMA 1 and 2 came before the key, with the original paper's theta.
    return {"rope_theta": 10000.0, **params}


def find_shards(ckpt_dir: Path) -> list[Path]:
    """The checkpoint's files in order. Raises FileNotFoundError where there are none, or one lacks."""
    found = {
        int(m[1]): path
        for path in ckpt_dir.iterdir()
        if (m := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    if not found:
        raise FileNotFoundError(f"no consolidated.*.pth in {ckpt_dir}: is this a native Llama checkpoint?")
    if missing := sorted(set(range(max(found) + 1)) - found.keys()):
        raise FileNotFoundError(
            f"{ckpt_dir} has {len(found)} shards up to {found[max(found)].name}, but consolidated."
            f"{missing[0]:02d}.pth is missing; download it again"
        )
    return [found[i] for i in sorted(found)]


def read_shard(path: Path) -> dict[str, Tensor]:
    """One file's tensors by name, memory-mapped, never executing what is in it.

    Raises CheckpointError for a file that is truncated, or a pickle of something else.
    """
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} holds more than tensors, so it was not loaded: {reason}") from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read, it may be truncated ({path.stat().st_size:,} bytes): {reason}"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise CheckpointError(f"{path} is not a table of tensors by name")
    return {name: tensor for name, tensor in tensors.items() if name not in IGNORED}


def load_weights(model: Transformer, shards: list[Path], dtype: torch.dtype, device: torch.device) -> None:
    """Fill a model that was built on the meta device with this rank's part of every tensor.

    Every rank opens every file, which costs nothing while they are only mapped, so each finds any
    fault. Where no file has `output.weight`, the embeddings serve as output too.
    Raises CheckpointError where a tensor is missing, unknown or of another shape than the model's.
    """
    parts = {name: Part.of(model, name) for name, _ in model.named_parameters()}
    loaded: dict[str, Tensor] = {}
    total = sum(weight.numel() for weight in model.parameters())
    quiet = True if model.parallel.rank else None  # None: tqdm looks whether anybody watches
    with tqdm(
        total=total, desc="Loading", unit=" weights", unit_scale=True, leave=False, disable=quiet
    ) as bar:
        for number, path in enumerate(shards):
            tensors = read_shard(path)
            if number == 0 and "output.weight" not in tensors:
                del parts["output.weight"]
            check_tensors(path, tensors, parts, len(shards))
            for name, part in parts.items():
                for here, there in part.overlaps(tensors[name].shape, number, len(shards)):
                    piece = tensors[name][there]
                    if piece.shape == part.local_shape and piece.is_contiguous():
                        loaded[name] = piece.to(device, dtype)  # no copy where nothing changes
                    else:
                        if name not in loaded:
                            loaded[name] = torch.empty(part.local_shape, dtype=dtype, device=device)
                        loaded[name][here].copy_(piece)
                    bar.update(piece.numel())
    loaded.setdefault("output.weight", loaded["tok_embeddings.weight"])
    model.load_state_dict(loaded, strict=True, assign=True)
    if "output.weight" not in parts:
        model.output.weight = model.tok_embeddings.weight


Index = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """What a rank holds of one tensor: `spans` of dimension `dim` of the whole; all, where dim is None."""

    shape: tuple[int, ...]
    dim: int | None
    spans: list[Span]
    other_dim: int | None  # along which files may be cut instead

    @staticmethod
    def of(model: Transformer, name: str) -> "Part":
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, Sharded):
            return Part(tuple(model.get_parameter(name).shape), None, [], None)
        # LLaMA 1 and 2 cut the embeddings along the other dimension than Llama 3.
        return Part(layer.shape, layer.dim, layer.spans, 1 if name == "tok_embeddings.weight" else None)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.shape if self.dim is None else self._resized(self.dim, sum(b - a for a, b in self.spans))

    def file_dim(self, shape: torch.Size, count: int) -> int | None:
        """The dimension that a file's tensor of this shape is cut along, one of `count`.

        None where it is not cut. Raises ValueError where the shape is not such a part's.
        """
        if self.dim is None:
            if shape == self.shape:
                return None
        else:
            for dim in (self.dim, self.other_dim):
                if dim is None or self.shape[dim] % count:
                    continue
                if shape == self._resized(dim, self.shape[dim] // count):
                    return dim
        belongs = f"{self.shape}" if self.dim is None else f"one of {count} parts of {self.shape}"
        found = f"has the shape {tuple(shape)}, where by params.json {belongs} belongs"
        whole = [n // m for n, m in zip(self.shape, shape, strict=False) if n != m and m and n % m == 0]
        hint = (
            f"is a shard missing? This looks like one of {whole[0]}"
            if whole
            else "do all files belong to one model?"
        )
        raise ValueError(f"{found}; {hint}")

    def overlaps(self, shape: torch.Size, number: int, count: int) -> Iterator[tuple[Index, Index]]:
        """Where this part meets the number-th of `count` files: its index here and its index there."""
        file_dim = self.file_dim(shape, count)
        if file_dim is None:
            if number == 0:
                yield (), ()
            return
        width = self.shape[file_dim] // count
        first, last = number * width, (number + 1) * width  # what the file holds of file_dim
        at = 0
        for start, stop in self.spans:
            low, high = max(start, first), min(stop, last)
            if file_dim != self.dim:
                yield (slice(at, at + stop - start), slice(first, last)), (slice(start, stop),)
            elif low < high:
                before = (slice(None),) * file_dim
                here, there = slice(at + low - start, at + high - start), slice(low - first, high - first)
                yield (*before, here), (*before, there)
            at += stop - start

    def _resized(self, dim: int, length: int) -> tuple[int, ...]:
        return (*self.shape[:dim], length, *self.shape[dim + 1 :])


def check_tensors(path: Path, tensors: Mapping[str, Tensor], parts: Mapping[str, Part], count: int) -> None:
    """Raise CheckpointError unless a file, one of `count`, has the model's tensors and no others."""
    if missing := [name for name in parts if name not in tensors]:
        raise CheckpointError(f"{path} lacks {_some(missing)}; is params.json that of this model?")
    if unknown := [name for name in tensors if name not in parts]:
        raise CheckpointError(f"{path} has {_some(unknown)}, which the model of params.json has not")
    for name, part in parts.items():
        tensor = tensors[name]
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}; fp32, fp16 and bf16 can be loaded")
        try:
            part.file_dim(tensor.shape, count)
        except ValueError as error:
            raise CheckpointError(f"{path}: {name} {error}") from None


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"
