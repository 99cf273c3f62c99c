"""What a checkpoint is, whatever its format, and the checks that all formats share.

Every format presents its weights as a `TensorSource`: whole tensors by native name, any part of which can
be read. `reader.RankReader` reads each rank's parts.
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
# Valid names of weight files: bare names, which cannot point outside their folder.
WEIGHTS = re.compile(
    r"consolidated\.\d+\.pth|[A-Za-z0-9_-][\w.-]*\.(safetensors|gguf)|(pytorch|adapter)_model[\w.-]*\.bin",
    re.ASCII,
)
IGNORED = {"rope.freqs"}  # LLaMA 1 and 2 saved this table, which follows from params.json


class TensorSource(Protocol):
    """A model's weights: whole tensors by native name, any part of which can be read.

    shapes: of all tensors (see `is_tied`).
    dtype: that most tensors are stored in; for quantized ones, that of the dequantized values.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        """A tensor, or a half-open span of its dimension `dim`; mapped from the file if possible."""
        ...

    def release(self) -> None:
        """Unmap files. The next `read` opens them again."""
        ...


@runtime_checkable
class QuantizedSource(TensorSource, Protocol):
    """A source with some matrices stored in 8, 5 or 4 bits. `read` dequantizes these."""

    def bits(self, name: str) -> int | None:
        """How many bits a matrix is stored in; None for a plain tensor."""
        ...

    def matrix(self, name: str) -> QuantizedMatrix:
        """A quantized matrix as stored; mapped from the file if possible."""
        ...


def stored_bits(source: TensorSource, name: str) -> int | None:
    """How many bits a source stores a model's matrix in; None for a plain tensor."""
    name = stored_name(source, name)
    return source.bits(name) if isinstance(source, QuantizedSource) else None


def stored_weight(source: TensorSource, name: str) -> Weight:
    """A whole tensor of a source, as stored."""
    if isinstance(source, QuantizedSource) and source.bits(name):
        return source.matrix(name)
    return source.read(name)


class Pages:
    """Unmaps a source's files from time to time, because pages that were read count as memory in use."""

    def __init__(self, source: TensorSource, limit: int = 2**28) -> None:
        """limit: bytes of mapped pages to keep at most."""
        self.source, self.limit, self.held = source, limit, 0

    def read(self, nbytes: int) -> None:
        """Call this after reading `nbytes` of the files that are no longer needed."""
        self.held += nbytes
        if self.held > self.limit:
            self.source.release()
            self.held = 0


@dataclass(frozen=True)
class Classifier:
    """A classifier's head, applied to the last token's hidden state.

    labels: the classes, in the order of the rows.
    weight: (labels, dim), on the CPU.
    """

    labels: list[str]
    weight: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """One model and where it was found.

    path: its folder or file.
    kind: "native", "Hugging Face" or "GGUF".
    family: the model family's common name.
    params: arguments for `ModelArgs`, with the names of `params.json`.
    context: tokens it was trained for; None if its files do not say.
    files: number of weight files.
    quantization: the format of its matrices if `weights` is a `QuantizedSource`: "int8", "int5" or "int4",
        or a GGUF file's own, such as "Q4_1".
    classifier: None for a language model.
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
    """A rank's part of one tensor: `spans` of dimension `dim` of the whole; all of it if dim is None."""

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
    """Whether the embeddings also serve as the output layer: then there is no `output.weight`."""
    return OUTPUT not in names


def stored_name(source: TensorSource, name: str) -> str:
    """The name under which a source stores a model's weight."""
    return EMBEDDINGS if name == OUTPUT and is_tied(source.shapes) else name


def whole_parts(args: ModelArgs, names: Container[str | None] = (OUTPUT,)) -> dict[str, Part]:
    """Every tensor of a model on one rank, by native name; tied if `names` has no output layer."""
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

    config: where these are defined, for the error message.
    """
    check_names(where, shapes, parts, config)
    for name, part in parts.items():
        if tuple(shapes[name]) != part.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(shapes[name])}, but {config} implies {part.shape}; "
                "do weights and configuration belong to the same model?"
            )


def check_float(path: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for a dtype that cannot be loaded."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}; fp32, fp16 and bf16 can be loaded")


def check_finite(name: str, weight: W) -> W:
    """The weight. Raises CheckpointError if any value is not finite, since no answer would be right."""
    for tensor in weight.tensors if isinstance(weight, QuantizedMatrix) else (weight,):
        # Minimum and maximum propagate NaN, and take a fraction of the time of `isfinite`.
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
    """Raise CheckpointError unless one or more files have the model's tensors and no others."""
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{where} lacks {some(missing)}; does {config} belong to this model?")
    if unknown := [name for name in found if name not in wanted]:
        raise CheckpointError(
            f"{where}: unexpected {some(unknown)}: not part of the model that {config} describes"
        )


def some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"


def listed_weights(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: the name of each tensor's file.

    Raises CheckpointError if it is missing or has an invalid name for a weight file.
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
    """One file's tensors by name, memory-mapped, without executing code from the file.

    Raises CheckpointError if the file is truncated or contains anything else.
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
    """The tokenizer at a path, else `tokenizer.model` in the folder or, as in Llama 2, above it."""
    if tokenizer_path is not None:
        return load_tokenizer(tokenizer_path)
    beside, above = ckpt_dir / "tokenizer.model", ckpt_dir.resolve().parent / "tokenizer.model"
    return load_tokenizer(above if above.is_file() and not beside.is_file() else beside)


def _plain_line(error: Exception) -> str:
    """The first line of a PyTorch error, without terminal colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", str(error).split("\n")[0])
