"""Hugging Face folders of Llama models: config.json, *.safetensors, tokenizer.json.

Weights are read in place, in slices. Query and key rows are stored for a rotary embedding that rotates
the two halves of a head; the native one rotates adjacent pairs, so the rows of each head are reordered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.classifier import SCORE, is_classifier, read_classifier
from llama.checkpoint.hf_config import read_config
from llama.checkpoint.source import (
    Checkpoint,
    check_names,
    find_tokenizer,
    listed_weights,
    read_shard,
    some,
    whole_parts,
)
from llama.errors import ArgumentError, CheckpointError, MissingPackageError, shown
from llama.files import id_list, read_json
from llama.model import ModelArgs
from llama.parallel import Span
from llama.quantization import OUTPUT
from llama.tokenizer import TextTokenizer
from llama.tokenizer.huggingface import HFTokenizer
from llama.tokenizer.template import find_template
from llama.vision import VisionArgs, make_args

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
HF_NAMES = {native: hf for hf, native in NAMES.items()}


def native_name(name: str) -> str | None:
    """model.layers.0.self_attn.q_proj.weight to layers.0.attention.wq.weight; None for unknown names."""
    match = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(\S+)\.weight", name)
    if not match or match[2] not in NAMES:
        return None
    return f"{match[1] or ''}{NAMES[match[2]]}.weight"


def hf_name(name: str) -> str:
    """layers.0.attention.wq.weight to model.layers.0.self_attn.q_proj.weight."""
    match = re.fullmatch(r"(layers\.\d+\.)?(\S+)\.weight", name)
    if not match:
        raise ArgumentError(f"{name} is not the name of a native tensor")
    return f"{'model.' + match[1] if match[1] else ''}{HF_NAMES[match[2]]}.weight"


def rotary_heads(name: str, args: ModelArgs) -> int | None:
    """How many heads the rows of a query or key matrix belong to; None for other matrices."""
    match = re.fullmatch(r"layers\.\d+\.attention\.w([qk])\.weight", name)
    return {"q": args.n_heads, "k": args.n_kv_heads}[match[1]] if match else None


def to_native_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads · head_dim, …) of query or key heads, from two halves per head to adjacent pairs."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_hf_rows(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_native_rows`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def open_huggingface(
    folder: Path,
    tokenizer_path: Path | None = None,
    read_params: Callable[[Path, Mapping[str, Any]], dict[str, Any]] | None = None,
    read_weights: type[HFWeights] | None = None,
) -> Checkpoint:
    """A Hugging Face folder, read in place.

    tokenizer_path: a native tokenizer to use instead of the folder's.
    read_params, read_weights: for an architecture that differs from Llama's
    Raises FileNotFoundError if a file is missing, ImportError if a package is missing, CheckpointError
    if the model is not supported or files do not belong together.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}: is the download complete?")
    config = read_json(folder / "config.json")
    params = (read_params or read_config)(folder / "config.json", config)
    args = make_args(params)
    classifies = is_classifier(config)
    tied = classifies or bool(config.get("tie_word_embeddings"))
    weights = (read_weights or HFWeights)(folder, args, tied, beside=[SCORE] if classifies else [])
    text = config.get("text_config") or config
    tokenizer: TextTokenizer
    if tokenizer_path is None and (folder / "tokenizer.json").is_file():
        tokenizer = HFTokenizer(
            folder, args.vocab_size, id_list(folder / "config.json", text, "eos_token_id")
        )
    else:
        tokenizer = find_tokenizer(folder, tokenizer_path)
    formatter = find_template(folder, tokenizer)
    if tokenizer.n_words > args.vocab_size + isinstance(args, VisionArgs):  # for the image token
        raise CheckpointError(
            f"the tokenizer has {tokenizer.n_words} tokens, but {folder / 'config.json'} says "
            f"vocab_size={args.vocab_size}: does the tokenizer belong to this model?"
        )
    return Checkpoint(
        path=folder,
        kind="Hugging Face",
        family=str((config.get("architectures") or [config.get("model_type", "llama")])[0]),
        params=params,
        weights=weights,
        tokenizer=tokenizer,
        formatter=formatter,
        context=text.get("max_position_embeddings"),
        files=len(weights.paths),
        classifier=read_classifier(folder / "config.json", config, args.dim, weights.stored)
        if classifies
        else None,
    )


class HFWeights:
    """The weights of a Hugging Face folder, as a `TensorSource`.

    Raises FileNotFoundError if a file is missing, CheckpointError if a tensor is missing, unknown, or of
    the wrong shape.
    """

    def __init__(self, folder: Path, args: ModelArgs, tied: bool, beside: Sequence[str] = ()) -> None:
        """beside: names of tensors that are not part of the model."""
        self.args = args
        where = find_weights(folder)
        self._beside = {name: where.pop(name) for name in beside if name in where}
        self.paths = sorted({*where.values()})
        self._opened: dict[Path, Any] = {}
        found = {self.usual_name(name): name for name in where}
        parts = whole_parts(args, () if tied and self.file_name(OUTPUT) not in found else (OUTPUT,))
        check_names(folder, found, dict.fromkeys(map(self.file_name, parts)), "config.json")
        self._names = {name: found[self.file_name(name)] for name in parts}
        self._where = {name: where[stored] for name, stored in self._names.items()}
        self.shapes = {name: part.shape for name, part in parts.items()}
        for name, part in parts.items():
            shape, dtype = self._describe(name)
            expected = self.file_shape(name, part.shape)
            if shape != expected:
                raise CheckpointError(
                    f"{self._where[name]}: {self._names[name]} has shape {shape}, but config.json "
                    f"implies {expected}"
                )
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{self._where[name]}: {self._names[name]} is {dtype}; fp32, fp16 and bf16 can be loaded"
                )
        self.dtype = DTYPES[self._describe("tok_embeddings.weight")[1]]

    def usual_name(self, name: str) -> str:
        """The usual name of a tensor that files may store under several names."""
        return name

    def file_name(self, name: str) -> str:
        """The usual name in files for a native name."""
        return hf_name(name)

    def file_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a native tensor in files."""
        return shape

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        stored = self._stored(name)
        if rotary_heads(name, self.args) is None:
            return _slice(stored, dim, span)
        head_dim = self.args.head_dim
        if span is None or dim == 1:
            return to_native_rows(_slice(stored, dim, span), head_dim)
        # Rows are reordered within their head, so whole heads are read.
        first, last = span[0] // head_dim, -(-span[1] // head_dim)
        rows = to_native_rows(_slice(stored, 0, (first * head_dim, last * head_dim)), head_dim)
        return rows[span[0] - first * head_dim : span[1] - first * head_dim]

    def release(self) -> None:
        self._opened = {}

    def stored(self, name: str) -> Any:
        """A tensor that is not part of the model. Raises CheckpointError if there is none."""
        if name not in self._beside:
            raise CheckpointError(f"{name} is missing; a classifier needs it")
        return self._open(self._beside[name], name)

    def _stored(self, name: str) -> Any:
        return self._open(self._where[name], self._names[name])

    def _open(self, path: Path, name: str) -> Any:
        if path not in self._opened:
            self._opened[path] = open_weights(path)
        opened = self._opened[path]
        return opened[name] if isinstance(opened, dict) else opened.get_slice(name)

    def _describe(self, name: str) -> tuple[tuple[int, ...], str]:
        stored = self._stored(name)
        if isinstance(stored, Tensor):
            return tuple(stored.shape), str(stored.dtype)
        return tuple(stored.get_shape()), stored.get_dtype()


DTYPES = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)},
}


def _slice(stored: Any, dim: int, span: Span | None) -> Tensor:
    part = slice(*span) if span else slice(None)
    tensor: Tensor = stored[part] if dim == 0 else stored[:, part]
    return tensor


def open_weights(path: Path) -> Any:
    """A safetensors handle; for a .bin file its tensors by name, memory-mapped, without running pickles."""
    if path.suffix == ".bin":
        return read_shard(path)
    try:
        import safetensors
    except ImportError:
        raise MissingPackageError(
            "Hugging Face folders need the safetensors package: pip install -e '.[hf]'"
        ) from None
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read and may be truncated ({path.stat().st_size:,} bytes): {error}"
        ) from None


def find_weights(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a folder, by Hugging Face's names.

    A single file with the exact name takes precedence over the files in an index, as in transformers.
    Without either, the parts of one model or the only file are used.

    Raises FileNotFoundError if there are no weights or a file is missing; CheckpointError if it is
    ambiguous which files are the model's, or a file does not contain what its index says.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        exact, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if exact.is_file():
            where = dict.fromkeys(tensor_names(exact), exact)
        elif index.is_file():
            where = indexed(folder, index)
        elif paths := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")) or sorted(folder.glob(f"*.{suffix}")):
            check_parts(paths, exact)
            where = {}
            for path in paths:
                names = tensor_names(path)
                if twice := [name for name in names if name in where]:
                    raise CheckpointError(
                        f"{path} and {where[twice[0]].name} both contain {some(twice)}; keep one of the files"
                    )
                where.update(dict.fromkeys(names, path))
        else:
            continue
        # Older files include tables of the rotary embedding, which follow from the config.
        return {name: path for name, path in where.items() if not name.endswith("rotary_emb.inv_freq")}
    raise FileNotFoundError(f"no *.safetensors in {folder}: is the download complete?")


def indexed(folder: Path, index: Path) -> dict[str, Path]:
    """The file of each tensor according to an index, checked against the files."""
    where = {name: folder / file for name, file in listed_weights(index).items()}
    paths = sorted({*where.values()})
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which {index.name} names; download it again"
        )
    held = {path: {*tensor_names(path)} for path in paths}
    if absent := [name for name, path in where.items() if name not in held[path]]:
        raise CheckpointError(
            f"{index} expects {shown(absent[0])} in {where[absent[0]].name}, which does not contain it"
        )
    return where


def check_parts(paths: Sequence[Path], exact: Path) -> None:
    """Raise unless files without an index are a single file, or all parts of one model."""
    parts = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.\w+", path.name) for path in paths]
    if (
        len(paths) > 1
        and len({(m[1], m[3]) if m else path for m, path in zip(parts, paths, strict=True)}) > 1
    ):
        raise CheckpointError(
            f"{exact.parent} has several files that could be the weights, but no index: "
            f"{', '.join(path.name for path in paths)}; keep one, or rename the right one to {exact.name}"
        )
    if first := parts[0]:
        numbers = {int(m[2]) for m in parts if m}
        if missing := next((n for n in range(1, int(first[3]) + 1) if n not in numbers), None):
            raise FileNotFoundError(
                f"{exact.parent} lacks part {missing} of {first[3]} of its weights; download them again"
            )


def tensor_names(path: Path) -> Sequence[str]:
    return list(open_weights(path).keys())
