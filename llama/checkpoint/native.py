"""Meta's native format: a folder of `consolidated.NN.pth` and `params.json`.

Each file holds the n-th part of every matrix, split along the same dimension as the parallel layer, and
complete norms. If a rank needs exactly what a file holds, the memory-mapped tensor becomes the weight and
nothing is copied.

Vision models store text tensors under `text_model.`; here they have the same names as in other models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.params import read_params
from llama.checkpoint.quantized import QuantizedShards
from llama.checkpoint.source import (
    Checkpoint,
    TensorSource,
    check_float,
    check_names,
    read_shard,
    whole_parts,
)
from llama.errors import ArgumentError, CheckpointError
from llama.model import ModelArgs
from llama.parallel import Span
from llama.tokenizer import DialogFormat, SentencePieceTokenizer, TextTokenizer, Tokenizer
from llama.tokenizer.chat_format import chat_format
from llama.vision import VisionArgs, make_args

TEXT = "text_model."


def find_shards(ckpt_dir: Path) -> list[Path]:
    """The checkpoint's files in order. Raises FileNotFoundError if there are none or one is missing."""
    found: dict[int, Path] = {}
    for path in sorted(ckpt_dir.iterdir()):
        m = re.fullmatch(r"consolidated\.(\d{1,6})\.pth", path.name)
        if m and (twin := found.setdefault(int(m[1]), path)) is not path:
            raise CheckpointError(
                f"{ckpt_dir} has both {twin.name} and {path.name}: keep one model per folder"
            )
    if not found and (single := ckpt_dir / "consolidated.pth").is_file():
        return [single]  # the name in Hugging Face's original/ folders
    if not found:
        raise FileNotFoundError(f"no consolidated.*.pth in {ckpt_dir}: is this a native Llama checkpoint?")
    if missing := sorted(set(range(max(found) + 1)) - found.keys()):
        raise FileNotFoundError(
            f"{ckpt_dir} has {len(found)} shards up to {found[max(found)].name}, but consolidated."
            f"{missing[0]:02d}.pth is missing; download it again"
        )
    return [found[i] for i in sorted(found)]


def open_native(
    ckpt_dir: Path, tokenizer: TextTokenizer, formatter: DialogFormat | None = None
) -> Checkpoint:
    """A native checkpoint, whose generation is recognised from its files.

    formatter: chat format, if something determines it better than the generation does.
    Raises FileNotFoundError if a file is missing, CheckpointError if files are inconsistent.
    """
    params = read_params(ckpt_dir)
    shards = find_shards(ckpt_dir)
    if params.get("vocab_size", -1) == -1:  # LLaMA 1 and 2 take it from the tokenizer
        params["vocab_size"] = tokenizer.n_words
    if params["vocab_size"] != tokenizer.n_words:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.n_words} tokens, but {ckpt_dir / 'params.json'} says "
            f"vocab_size={params['vocab_size']}: is it the tokenizer.model of this checkpoint?"
        )
    quantization = params.pop("quantization", None)
    read = QuantizedShards if quantization else NativeShards
    weights: TensorSource = read(shards, make_args(params))
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
    """Family, context and chat format of a native checkpoint, recognised from its files.

    Base and chat models of a generation differ only in their weights. What `format.json` says takes
    precedence over what the weights show.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        # LLaMA 1 was released in fp16 and Llama 2 in bf16. LLaMA 1 65B is the only one with the later
        # norm_eps; its key heads distinguish it from Llama 2 70B.
        first = weights.dtype == torch.float16 and (
            params.get("norm_eps") == 1e-6
            or (params["dim"] == 8192 and params.get("n_kv_heads") in (None, params["n_heads"]))
        )
        return ("LLaMA", 2048, "none") if first else ("Llama 2", 4096, tokenizer.chat_format)
    if not isinstance(tokenizer, Tokenizer):
        return "Llama architecture", getattr(tokenizer, "context", None), tokenizer.chat_format
    if "<|start_header_id|>" not in tokenizer.special_tokens:
        return "Llama architecture", tokenizer.layout.context, tokenizer.chat_format
    # In base models, the header tokens' embeddings still have their initial value, zero.
    header = tokenizer.special_tokens["<|start_header_id|>"]
    rows = [weights.read("tok_embeddings.weight", 0, (i, i + 1)).float().norm().item() for i in (0, header)]
    chat = "none" if rows[0] > 1e-6 and rows[1] < 1e-9 else tokenizer.chat_format
    if not params.get("use_scaled_rope"):
        return "Llama 3", tokenizer.layout.context or 8192, chat
    if "vision_chunk_size" in params:
        return "Llama 3.2 Vision", tokenizer.layout.context or 131072, chat
    small = ModelArgs(**params).rope_scaling_factor == 32
    return "Llama 3.2" if small else "Llama 3.1 or 3.3", tokenizer.layout.context or 131072, chat


class NativeShards:
    """The weights of native shards, as a `TensorSource`.

    All files are opened up front, which costs nothing because they are only mapped, so that any fault is
    found early. Raises CheckpointError if a tensor is missing, unknown or of the wrong shape.
    """

    def __init__(self, paths: Sequence[Path], args: ModelArgs) -> None:
        self.paths = paths
        self.head_dim = args.head_dim
        self._mapped = {path: read_tensors(path) for path in paths}
        first = self._mapped[paths[0]]
        self.parts = whole_parts(args, first)
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
        """The dimension that files are split along, None if they are not, and how many hold the same part.

        Raises ValueError if `shape` is not that of such a part.
        """
        part, count = self.parts[name], len(self.paths)
        if part.dim is None and tuple(shape) == part.shape:
            return None, 1
        # LLaMA 1 and 2 split the embeddings along the other dimension than Llama 3.
        for dim in (part.dim, 1 if name == "tok_embeddings.weight" else None):
            if dim is None or part.shape[dim] % count:
                continue
            if tuple(shape) == part.resized(dim, part.shape[dim] // count):
                return dim, 1
        if re.search(r"attention\.w[kv]\.", name) and tuple(shape) == part.resized(0, self.head_dim):
            # With more files than key heads, each file has one: 0, 0, 1, 1, …
            copies, rest = divmod(count * self.head_dim, part.shape[0])
            if rest == 0:
                return 0, copies
        implied = f"{part.shape}" if part.dim is None else f"one of {count} parts of {part.shape}"
        found = f"has shape {tuple(shape)}, but params.json implies {implied}"
        whole = [n // m for n, m in zip(part.shape, shape, strict=False) if n != m and m and n % m == 0]
        hint = (
            f"is a shard missing? This looks like one of {whole[0]}"
            if whole
            else "do all files belong to the same model?"
        )
        raise ArgumentError(f"{found}; {hint}")

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
                    f"{path}: {name} is split along a different dimension than in {self.paths[0].name}; "
                    "do all files belong to the same model?"
                )

    def _tensors(self, number: int) -> Mapping[str, Tensor]:
        path = self.paths[number]
        if path not in self._mapped:
            self._mapped[path] = read_tensors(path)
        return self._mapped[path]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors, as from `read_shard`, under the names that this package uses."""
    return {name.removeprefix(TEXT): tensor for name, tensor in read_shard(path).items()}


def file_name(name: str, args: ModelArgs) -> str:
    """A tensor's name in Meta's files."""
    return TEXT + name if isinstance(args, VisionArgs) and not name.startswith("vision_model.") else name
