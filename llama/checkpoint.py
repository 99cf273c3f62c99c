"""Checkpoints: what one is, whatever its format, and how its weights reach the ranks of a model.

A format offers its weights as a `TensorSource`: whole tensors by their native names, of which any
part can be read. `load_weights` fills a model from any source.

Meta's native format is here; those of others are in `llama.interop`. It is a folder of
`consolidated.NN.pth` and `params.json`. Each file holds the n-th part of every matrix, cut along the
dimension that the parallel layer has too; norms lie whole in each file. Where a rank needs exactly
what a file holds, the memory-mapped tensor becomes the weight itself and nothing is copied.

A folder of quantized weights looks the same, but for a key `quantization` in its `params.json`, and its
files hold whole matrices: some of them each, in numbers that any rank can take its part of.
"""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from llama.chat_format import DialogFormat, chat_format
from llama.model import ModelArgs, Transformer
from llama.parallel import ModelParallel, Sharded, Span
from llama.tokenizer import SentencePieceTokenizer, TextTokenizer, Tokenizer, load_tokenizer

QUANTIZATIONS = ("int8", "int4")  # that a folder can hold
GROUP = 32  # weights of 4 bits that share a scale and a zero point of bf16, which makes 5 bits a weight
EMBEDDINGS = "tok_embeddings.weight"
OUTPUT = "output.weight"
IGNORED = {"rope.freqs"}  # LLaMA 1 and 2 saved this table, which follows from params.json
# Bytes copied from mapped files before they are let go of, so that they do not fill the memory.
RELEASE_AFTER = 2**30


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or not what its params.json says."""


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


def read_params(ckpt_dir: Path) -> dict[str, Any]:
    """The `params.json` of a checkpoint: arguments for `ModelArgs`, and perhaps `quantization`.

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
    if unknown := sorted(params.keys() - known - {"quantization"}):
        raise CheckpointError(f"{path} has {', '.join(unknown)}, which this model does not implement")
    if params.get("quantization", "int8") not in QUANTIZATIONS:
        raise CheckpointError(
            f"{path} has quantization={params['quantization']!r}; {' and '.join(QUANTIZATIONS)} can be loaded"
        )
    # LLaMA 1 and 2 came before the key, with the original paper's theta.
    return {"rope_theta": 10000.0, **params}


def feed_forward(dim: int, hidden_dim: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` that make `ModelArgs.hidden_dim` come out as given."""
    plain = int(2 * 4 * dim / 3)
    for multiple_of in (256, 1024, 4096):
        if multiple_of * -(-plain // multiple_of) == hidden_dim:
            return {"multiple_of": multiple_of}
    # Half a unit more than needed, because the product is rounded down.
    return {"multiple_of": 1, "ffn_dim_multiplier": (hidden_dim + 0.5) / plain}


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


def open_native(
    ckpt_dir: Path, tokenizer: TextTokenizer, formatter: DialogFormat | None = None
) -> Checkpoint:
    """A native checkpoint, its generation told by its files.

    formatter: of dialogs, where something tells it better than the generation.
    Raises FileNotFoundError where a file lacks, CheckpointError where they do not belong together.
    """
    params = read_params(ckpt_dir)
    shards = find_shards(ckpt_dir)
    if params.get("vocab_size", -1) == -1:  # LLaMA 1 and 2 leave it to the tokenizer
        params["vocab_size"] = tokenizer.n_words
    if params["vocab_size"] != tokenizer.n_words:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.n_words} tokens, but {ckpt_dir / 'params.json'} says "
            f"vocab_size={params['vocab_size']}: is it the tokenizer.model of this checkpoint?"
        )
    quantization = params.pop("quantization", None)
    read = QuantizedShards if quantization else NativeShards
    weights: TensorSource = read(shards, ModelArgs(**params))
    family, context, chat = recognize(params, weights, tokenizer)
    return Checkpoint(
        path=ckpt_dir,
        kind="native",
        family=family,
        params=params,
        weights=weights,
        tokenizer=tokenizer,
        formatter=formatter or chat_format(tokenizer, chat),
        context=context,
        files=len(shards),
        quantization=quantization,
    )


def recognize(
    params: Mapping[str, Any], weights: TensorSource, tokenizer: TextTokenizer
) -> tuple[str, int | None, str]:
    """Family, context and chat format of a native checkpoint, as its files tell them.

    Base and chat models of a generation have the same files, but for the numbers in them. What
    `format.json` says goes before what is seen in the weights.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        # LLaMA 1 came in fp16 and Llama 2 in bf16. Of LLaMA 1, 65B alone has the later norm_eps, and
        # is told from Llama 2 70B by its key heads.
        first = weights.dtype == torch.float16 and (
            params.get("norm_eps") == 1e-6
            or (params["dim"] == 8192 and params.get("n_kv_heads") in (None, params["n_heads"]))
        )
        return ("LLaMA", 2048, "none") if first else ("Llama 2", 4096, tokenizer.chat_format)
    if not isinstance(tokenizer, Tokenizer):
        return "Llama architecture", getattr(tokenizer, "context", None), tokenizer.chat_format
    if "<|start_header_id|>" not in tokenizer.special_tokens:
        return "Llama architecture", tokenizer.layout.context, tokenizer.chat_format
    # The headers' embeddings of base models were left as they were initialised, at zero.
    header = tokenizer.special_tokens["<|start_header_id|>"]
    rows = [weights.read("tok_embeddings.weight", 0, (i, i + 1)).float().norm().item() for i in (0, header)]
    chat = "none" if rows[0] > 1e-6 and rows[1] < 1e-9 else tokenizer.chat_format
    if not params.get("use_scaled_rope"):
        return "Llama 3", tokenizer.layout.context or 8192, chat
    small = ModelArgs(**params).rope_scaling_factor == 32
    return "Llama 3.2" if small else "Llama 3.1 or 3.3", tokenizer.layout.context or 131072, chat


def find_tokenizer(ckpt_dir: Path, tokenizer_path: Path | None) -> TextTokenizer:
    """The tokenizer given, else `tokenizer.model` in the folder, or above it as Meta laid out Llama 2."""
    if tokenizer_path is not None:
        return load_tokenizer(tokenizer_path)
    beside, above = ckpt_dir / "tokenizer.model", ckpt_dir.resolve().parent / "tokenizer.model"
    return load_tokenizer(above if above.is_file() and not beside.is_file() else beside)


class NativeShards:
    """The weights of native shards, as a `TensorSource`.

    Every file is opened at once, which costs nothing while it is only mapped, so that any fault is
    found. Raises CheckpointError where a tensor is missing, unknown or of another shape than the model's.
    """

    def __init__(self, paths: Sequence[Path], args: ModelArgs) -> None:
        self.paths = paths
        self.head_dim = args.head_dim
        parts = whole_parts(args)
        self._mapped = {path: read_shard(path) for path in paths}
        first = self._mapped[paths[0]]
        if "output.weight" not in first:
            del parts["output.weight"]
        self.parts = parts
        for path, tensors in self._mapped.items():
            self._check(path, tensors)
        self.dtype = first["tok_embeddings.weight"].dtype

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self.parts.items()}

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        part, first = self.parts[name], self._tensors(0)[name]
        file_dim, copies = self.cut(name, first.shape)
        start, stop = span or (0, part.shape[dim])
        if file_dim is None:
            return first.narrow(dim, start, stop - start)
        width = first.shape[file_dim]
        if file_dim != dim:
            low, high = 0, part.shape[file_dim]
        else:
            low, high = start, stop
        pieces = []
        for number in range(low // width, -(-high // width)):
            piece = self._tensors(number * copies)[name]
            at = number * width
            begin, end = max(low, at) - at, min(high, at + width) - at
            piece = piece.narrow(file_dim, begin, end - begin)
            pieces.append(piece if file_dim == dim else piece.narrow(dim, start, stop - start))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, file_dim)

    def release(self) -> None:
        self._mapped = {}

    def cut(self, name: str, shape: Sequence[int]) -> tuple[int | None, int]:
        """The dimension that files are cut along, None where they are not, and how many hold the same.

        Raises ValueError where this is not the shape of such a part.
        """
        part, count = self.parts[name], len(self.paths)
        if part.dim is None and tuple(shape) == part.shape:
            return None, 1
        # LLaMA 1 and 2 cut the embeddings along the other dimension than Llama 3.
        for dim in (part.dim, 1 if name == "tok_embeddings.weight" else None):
            if dim is None or part.shape[dim] % count:
                continue
            if tuple(shape) == part.resized(dim, part.shape[dim] // count):
                return dim, 1
        if re.search(r"attention\.w[kv]\.", name) and tuple(shape) == part.resized(0, self.head_dim):
            # Of more files than key heads, each has one: 0, 0, 1, 1, …
            copies, rest = divmod(count * self.head_dim, part.shape[0])
            if rest == 0:
                return 0, copies
        belongs = f"{part.shape}" if part.dim is None else f"one of {count} parts of {part.shape}"
        found = f"has the shape {tuple(shape)}, where by params.json {belongs} belongs"
        whole = [n // m for n, m in zip(part.shape, shape, strict=False) if n != m and m and n % m == 0]
        hint = (
            f"is a shard missing? This looks like one of {whole[0]}"
            if whole
            else "do all files belong to one model?"
        )
        raise ValueError(f"{found}; {hint}")

    def _check(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        check_names(path, tensors, self.parts)
        for name in self.parts:
            tensor = tensors[name]
            check_float(path, name, tensor)
            try:
                cut = self.cut(name, tensor.shape)
            except ValueError as error:
                raise CheckpointError(f"{path}: {name} {error}") from None
            if cut != self.cut(name, self._mapped[self.paths[0]][name].shape):
                raise CheckpointError(
                    f"{path}: {name} is cut along another dimension than in {self.paths[0].name}; "
                    "do all files belong to one model?"
                )

    def _tensors(self, number: int) -> Mapping[str, Tensor]:
        path = self.paths[number]
        if path not in self._mapped:
            self._mapped[path] = read_shard(path)
        return self._mapped[path]


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
                    f"{path} has {_some(twice)} that {self._where[twice[0]].name} has too; "
                    "do all files belong to one model?"
                )
            self._where.update(dict.fromkeys(tensors, path))
        folder = paths[0].parent
        wanted = {key: name for name in self.parts for key in self._keys(name)}
        if missing := [key for key in wanted if key not in self._where]:
            raise CheckpointError(
                f"{folder} lacks {_some(missing)} of a quantized model; is a file of it missing, or is "
                "params.json that of another model?"
            )
        if unknown := [key for key in self._where if key not in wanted]:
            raise CheckpointError(f"{folder} has {_some(unknown)}, which the model of params.json has not")
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
        if self.parts[name].dim is None:
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


def unpacked(weight: Tensor) -> Tensor:
    """uint8 (out, in / 2), two values of 4 bits to a byte, to uint8 (out, in)."""
    return torch.stack((weight & 15, weight >> 4), -1).flatten(1)


def dequantized(stored: Sequence[Tensor]) -> Tensor:
    """fp32 (out, in) of a stored matrix, as `QuantizedShards` has them."""
    weight, scales, *zeros = stored
    if not zeros:
        return weight * scales[:, None]
    groups = unpacked(weight).unflatten(1, (-1, GROUP)).float() - 8
    return groups.mul_(scales[..., None].float()).add_(zeros[0][..., None].float()).flatten(1)


def widened(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantized` int8 rows, a few at a time, so that no large fp32 copy is made."""
    wide = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows, scale, to in zip(*(tensor.split(4096) for tensor in (weight, scales, wide)), strict=True):
        to.copy_(dequantized((rows, scale)))
    return wide


class RankReader:
    """This rank's parts of a source's tensors, by name, with a bar to watch.

    release_after: bytes copied from mapped files before they are let go of.
    Where the source has no `output.weight`, the embeddings serve as output too.
    Raises CheckpointError where a tensor is missing, unknown or of another shape than the model's.
    """

    def __init__(self, model: Transformer, source: TensorSource, release_after: int = RELEASE_AFTER) -> None:
        self.parts = {name: Part.of(model, name) for name, _ in model.named_parameters()}
        self.tied = "output.weight" not in source.shapes
        check_shapes(source.shapes, {n: p for n, p in self.parts.items() if not self.tied or n != OUTPUT})
        self.source, self._release_after = source, release_after
        self._unreleased = 0
        total = sum(weight.numel() for weight in model.parameters())
        quiet = True if model.parallel.rank else None  # None: tqdm looks whether anybody watches
        self._bar = tqdm(
            total=total, desc="Loading", unit=" weights", unit_scale=True, leave=False, disable=quiet
        )

    def __enter__(self) -> "RankReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def read(self, name: str) -> Tensor:
        """A part; mapped from the file where it can be."""
        part = self.parts[name]
        stored = "tok_embeddings.weight" if self.tied and name == OUTPUT else name
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


def load_weights(model: Transformer, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a model that was built on the meta device with this rank's part of every tensor.

    Where the source has no `output.weight`, the embeddings serve as output too.
    Raises CheckpointError where a tensor is missing, unknown or of another shape than the model's.
    """
    loaded: dict[str, Tensor] = {}
    with RankReader(model, source) as reader:
        for name in reader.parts:
            if reader.tied and name == OUTPUT:
                continue
            weight = reader.read(name)
            # No copy where nothing changes.
            loaded[name] = weight.to(device, dtype).contiguous()
            reader.done(weight.numel(), weight.nbytes if loaded[name] is not weight else 0)
    loaded.setdefault(OUTPUT, loaded["tok_embeddings.weight"])
    model.load_state_dict(loaded, strict=True, assign=True)
    if reader.tied:
        model.output.weight = model.tok_embeddings.weight


@dataclass(frozen=True)
class Part:
    """What a rank holds of one tensor: `spans` of dimension `dim` of the whole; all, where dim is None."""

    shape: tuple[int, ...]
    dim: int | None
    spans: list[Span]

    @staticmethod
    def of(model: Transformer, name: str) -> "Part":
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, Sharded):
            return Part(tuple(model.get_parameter(name).shape), None, [])
        return Part(layer.shape, layer.dim, layer.spans)

    def resized(self, dim: int, length: int) -> tuple[int, ...]:
        return (*self.shape[:dim], length, *self.shape[dim + 1 :])


def whole_parts(args: ModelArgs) -> dict[str, Part]:
    """Every tensor of a model on one rank, by its native name."""
    with torch.device("meta"):
        model = Transformer(args, ModelParallel())
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
        raise CheckpointError(f"{where} lacks {_some(missing)}; is {config} that of this model?")
    if unknown := [name for name in found if name not in wanted]:
        raise CheckpointError(f"{where} has {_some(unknown)}, which the model of {config} has not")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"
