"""What a checkpoint is, whatever its format, and the checks that all formats share.

A format offers its weights as a `TensorSource`: whole tensors by their native names, of which any
part can be read. `reader.load_weights` fills a model from any source.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama.errors import CheckpointError
from llama.model import ModelArgs
from llama.parallel import ModelParallel, Sharded, Span
from llama.tokenizer import DialogFormat, TextTokenizer, load_tokenizer
from llama.vision import make_model

EMBEDDINGS = "tok_embeddings.weight"


OUTPUT = "output.weight"


IGNORED = {"rope.freqs"}  # LLaMA 1 and 2 saved this table, which follows from params.json


# Bytes copied from mapped files before they are let go of, so that they do not fill the memory.
RELEASE_AFTER = 2**30


class TensorSource(Protocol):
    """A model's weights: whole tensors by their native names, of which any part can be read.

    shapes: of all tensors; `output.weight` lacks where the embeddings serve as output too.
    dtype: what most of them are stored in; quantized ones count as what they are read as.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        """A tensor, or the half-open span of its dimension `dim`; mapped from the file where it can be."""
        ...

    def release(self) -> None:
        """Let go of mapped files. The next `read` opens them again."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """One model as it was found.

    path: its folder or file. kind: "native", "Hugging Face" or "GGUF". family: of models, as people
    call it. params: arguments for `ModelArgs`, by the names of `params.json`. context: tokens it was
    trained for, None where its files do not say. files: how many hold weights. quantization: "int8" or
    "int4" where the matrices are stored so, with `QuantizedShards` as weights.
    """

    path: Path
    kind: str
    family: str
    params: dict[str, Any]
    weights: TensorSource
    tokenizer: TextTokenizer
    formatter: DialogFormat
    context: int | None
    files: int
    quantization: str | None = None


@dataclass(frozen=True)
class Part:
    """What a rank holds of one tensor: `spans` of dimension `dim` of the whole; all, where dim is None."""

    shape: tuple[int, ...]
    dim: int | None
    spans: list[Span]

    @staticmethod
    def of(model: nn.Module, name: str) -> Part:
        layer = model.get_submodule(name.rpartition(".")[0])
        bias = name.endswith(".bias")
        if not isinstance(layer, Sharded) or (bias and layer.dim == 1):
            return Part(tuple(model.get_parameter(name).shape), None, [])
        return Part(layer.shape[:1] if bias else layer.shape, layer.dim, layer.spans)

    def resized(self, dim: int, length: int) -> tuple[int, ...]:
        return (*self.shape[:dim], length, *self.shape[dim + 1 :])


def whole_parts(args: ModelArgs) -> dict[str, Part]:
    """Every tensor of a model on one rank, by its native name."""
    with torch.device("meta"):
        model = make_model(args, ModelParallel())
    return {name: Part.of(model, name) for name, _ in model.named_parameters()}


def check_shapes(shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Part]) -> None:
    """Raise CheckpointError unless a source has the model's tensors, in its shapes, and no others."""
    check_names("the checkpoint", shapes, parts)
    for name, part in parts.items():
        if tuple(shapes[name]) != part.shape:
            raise CheckpointError(
                f"{name} has the shape {tuple(shapes[name])}, where by the model's parameters "
                f"{part.shape} belongs; do weights and configuration belong to one model?"
            )


def check_float(path: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for a dtype that no model is computed in."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}; fp32, fp16 and bf16 can be loaded")


def check_names(
    where: Path | str, found: Mapping[str, Any], wanted: Mapping[str, Any], config: str = "params.json"
) -> None:
    """Raise CheckpointError unless a file, or several, has the model's tensors and no others."""
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{where} lacks {some(missing)}; is {config} that of this model?")
    if unknown := [name for name in found if name not in wanted]:
        raise CheckpointError(f"{where} has {some(unknown)}, which the model of {config} has not")


def some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"


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


def find_tokenizer(ckpt_dir: Path, tokenizer_path: Path | None) -> TextTokenizer:
    """The tokenizer given, else `tokenizer.model` in the folder, or above it as Meta laid out Llama 2."""
    if tokenizer_path is not None:
        return load_tokenizer(tokenizer_path)
    beside, above = ckpt_dir / "tokenizer.model", ckpt_dir.resolve().parent / "tokenizer.model"
    return load_tokenizer(above if above.is_file() and not beside.is_file() else beside)
