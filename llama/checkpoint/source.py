"""What a checkpoint is, whatever its format, and the checks that all formats share.

A format offers its weights as a `TensorSource`: whole tensors by their native names, of which any
part can be read. `reader.RankReader` gives each rank its parts.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from llama.errors import CheckpointError, shown
from llama.files import check_kinds, read_json
from llama.model import ModelArgs
from llama.parallel import ModelParallel, Sharded, Span
from llama.quantization import EMBEDDINGS, OUTPUT, QuantizedMatrix, Weight
from llama.tokenizer import DialogFormat, TextTokenizer, load_tokenizer
from llama.vision import make_model

W = TypeVar("W", Tensor, QuantizedMatrix, Weight)
# What files of weights are called: bare names, which cannot lead out of their folder.
WEIGHTS = re.compile(
    r"consolidated\.\d+\.pth|[A-Za-z0-9_-][\w.-]*\.(safetensors|gguf)|(pytorch|adapter)_model[\w.-]*\.bin",
    re.ASCII,
)
IGNORED = {"rope.freqs"}  # LLaMA 1 and 2 saved this table, which follows from params.json


class TensorSource(Protocol):
    """A model's weights: whole tensors by their native names, of which any part can be read.

    shapes: of all tensors (see `is_tied`).
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


@runtime_checkable
class QuantizedSource(TensorSource, Protocol):
    """A source some of whose matrices are stored in 8, 5 or 4 bits. `read` dequantizes these."""

    def bits(self, name: str) -> int | None:
        """How many bits a matrix is stored in; None for a plain tensor."""
        ...

    def matrix(self, name: str) -> QuantizedMatrix:
        """A quantized matrix as it is stored; mapped from the file where it can be."""
        ...


def stored_bits(source: TensorSource, name: str) -> int | None:
    """How many bits a source has a matrix of a model in; None for a plain tensor."""
    name = stored_name(source, name)
    return source.bits(name) if isinstance(source, QuantizedSource) else None


def stored_weight(source: TensorSource, name: str) -> Weight:
    """A whole tensor of a source as it is stored."""
    if isinstance(source, QuantizedSource) and source.bits(name):
        return source.matrix(name)
    return source.read(name)


class Pages:
    """Lets go of a source's mapped files now and then: what was read of them would count as memory in use."""

    def __init__(self, source: TensorSource, limit: int = 2**28) -> None:
        """limit: bytes that may be mapped and read at a time."""
        self.source, self.limit, self.held = source, limit, 0

    def read(self, nbytes: int) -> None:
        """To be called when as many bytes of the files were read, and are not needed any more."""
        self.held += nbytes
        if self.held > self.limit:
            self.source.release()
            self.held = 0


@dataclass(frozen=True)
class Classifier:
    """What a classifier has on top of the last token's hidden state.

    labels: the classes, in the order of the rows.
    weight: (labels, dim), on the CPU.
    """

    labels: list[str]
    weight: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """One model as it was found.

    path: its folder or file. kind: "native", "Hugging Face" or "GGUF". family: of models, as people
    call it. params: arguments for `ModelArgs`, by the names of `params.json`. context: tokens it was
    trained for, None where its files do not say. files: how many hold weights. quantization: what its
    matrices are quantized to, with a `QuantizedSource` as weights: "int8", "int5" or "int4", or "Q4_1" and
    the like for a GGUF file. classifier: None for a model of language.
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
    classifier: Classifier | None = None


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


def is_tied(names: Container[str | None]) -> bool:
    """Whether the embeddings serve as the output layer too: then there is no `output.weight`."""
    return OUTPUT not in names


def stored_name(source: TensorSource, name: str) -> str:
    """The tensor of a source that holds a model's weight."""
    return EMBEDDINGS if name == OUTPUT and is_tied(source.shapes) else name


def whole_parts(args: ModelArgs, names: Container[str | None] = (OUTPUT,)) -> dict[str, Part]:
    """Every tensor of a model on one rank, by its native name, if it is tied as these names are."""
    with torch.device("meta"):
        model = make_model(args, ModelParallel())
    parts = {name: Part.of(model, name) for name, _ in model.named_parameters()}
    if is_tied(names):
        del parts[OUTPUT]
    return parts


def check_shapes(
    where: Path, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Part], config: str
) -> None:
    """Raise CheckpointError unless a source has the model's tensors, in its shapes, and no others.

    config: what says which these are, for people.
    """
    check_names(where, shapes, parts, config)
    for name, part in parts.items():
        if tuple(shapes[name]) != part.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(shapes[name])}, but {config} implies {part.shape}; "
                "do weights and configuration belong to the same model?"
            )


def check_float(path: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for a dtype that no model is computed in."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}; fp32, fp16 and bf16 can be loaded")


def check_finite(name: str, weight: W) -> W:
    """The weight. Raises CheckpointError if a value of it is not finite: no answer would be right."""
    for tensor in weight.tensors if isinstance(weight, QuantizedMatrix) else (weight,):
        # The extremes propagate NaN, and read a tensor many times faster than `isfinite` does.
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not torch.stack(tensor.aminmax()).isfinite().all()
        ):
            raise CheckpointError(
                f"{name} has NaN or infinite values, so the checkpoint is damaged: download it again"
            )
    return weight


def check_names(
    where: Path | str, found: Mapping[str, Any], wanted: Mapping[str, Any], config: str = "params.json"
) -> None:
    """Raise CheckpointError unless a file, or several, has the model's tensors and no others."""
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{where} lacks {some(missing)}; does {config} belong to this model?")
    if unknown := [name for name in found if name not in wanted]:
        raise CheckpointError(
            f"{where}: unexpected {some(unknown)}: not part of the model that {config} describes"
        )


def some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"


def listed_weights(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: the name of the file that holds each tensor.

    Raises CheckpointError if it is missing or has a name that files of weights do not have.
    """
    content = read_json(index)
    check_kinds(index, content, {"weight_map": (dict,)})
    listed: dict[str, str] = content.get("weight_map") or {}
    if not listed:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for file in listed.values():
        if not isinstance(file, str) or not WEIGHTS.fullmatch(file):
            raise CheckpointError(f"{index} names {shown(file)}, which is not a valid name for a weight file")
    return listed


def read_shard(path: Path) -> dict[str, Tensor]:
    """One file's tensors by name, memory-mapped, never executing what is in it.

    Raises CheckpointError for a file that is truncated, or a pickle of something else.
    """
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _plain_line(error)
        raise CheckpointError(f"{path} contains more than tensors, so it was not loaded: {reason}") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = _plain_line(error)
        raise CheckpointError(
            f"{path} cannot be read and may be truncated ({path.stat().st_size:,} bytes): {reason}"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise CheckpointError(f"{path} does not map names to tensors")
    for name, tensor in tensors.items():
        kinds = {"sparse": tensor.layout != torch.strided, "meta": tensor.is_meta}
        kinds |= {"nested": tensor.is_nested, "quantized": tensor.is_quantized}
        if found := [kind for kind, so in kinds.items() if so]:
            raise CheckpointError(
                f"{path}: {shown(name)} is a {found[0]} tensor; only plain ones can be loaded"
            )
    return {name: tensor for name, tensor in tensors.items() if name not in IGNORED}


def find_tokenizer(ckpt_dir: Path, tokenizer_path: Path | None) -> TextTokenizer:
    """The tokenizer given, else `tokenizer.model` in the folder, or above it as Meta laid out Llama 2."""
    if tokenizer_path is not None:
        return load_tokenizer(tokenizer_path)
    beside, above = ckpt_dir / "tokenizer.model", ckpt_dir.resolve().parent / "tokenizer.model"
    return load_tokenizer(above if above.is_file() and not beside.is_file() else beside)


def _plain_line(error: Exception) -> str:
    """The first line of an error of PyTorch's, without what colours a terminal."""
    return re.sub(r"\x1b\[[\d;]*m", "", str(error).split("\n")[0])
