"""GGUF files of the `llama` architecture, read in place by the `gguf` package.

GGUF keeps the query and key channels of this architecture in the native order already, so reading
one is new names, plain numbers for blocks of quantized ones, and the tokenizer.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.params import feed_forward
from llama.checkpoint.source import Checkpoint, check_names, whole_parts
from llama.errors import CheckpointError, MissingPackageError
from llama.model import ModelArgs, rope_frequencies
from llama.parallel import Span
from llama.tokenizer import (
    DialogFormat,
    Layout,
    SentencePieceTokenizer,
    TextTokenizer,
    Tokenizer,
    load_tokenizer,
)
from llama.tokenizer.bpe import LLAMA3_PATTERN, byte_alphabet
from llama.tokenizer.chat_format import chat_format
from llama.tokenizer.template import ChatTemplate

NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
# How each byte-level tokenizer cuts text before merging, by the names that GGUF gives it.
_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3"), LLAMA3_PATTERN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), _GPT2),
    **dict.fromkeys(("qwen2", "stablelm2"), LLAMA3_PATTERN.replace("{1,3}", "")),
    "tekken": _TEKKEN,
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # of gguf.TokenType
ENDS = ("<|end_of_text|>", "<|endoftext|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>")


class GGUFError(CheckpointError):
    """A GGUF file that holds something other than a Llama model, or more than this package reads."""


def open_gguf(path: Path, tokenizer_path: Path | None = None) -> Checkpoint:
    """The model of a GGUF file, read in place.

    tokenizer_path: of another tokenizer than the file's own.
    Raises FileNotFoundError without a file, ImportError without the gguf package, GGUFError for a
    file that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    reader = read(path)
    if (parts := reader.fields.get("split.count")) and parts.contents() > 1:
        raise GGUFError(
            f"{path} is one of {parts.contents()} parts; merge them first (llama-gguf-split --merge)"
        )
    fields = {name: field.contents() for name, field in reader.fields.items()}
    params = read_params(fields, {tensor.name: tensor for tensor in reader.tensors})
    weights = GGUFWeights(path, reader.tensors, ModelArgs(**params))
    tokenizer = read_tokenizer(fields) if tokenizer_path is None else load_tokenizer(tokenizer_path)
    return Checkpoint(
        path=path,
        kind="GGUF",
        family=fields.get("general.name") or "Llama architecture",
        params=params,
        weights=weights,
        tokenizer=tokenizer,
        formatter=read_formatter(path, fields, tokenizer),
        context=fields.get("llama.context_length"),
        files=1,
    )


def read(path: Path) -> Any:
    """A `gguf.GGUFReader`. Raises GGUFError for another kind of file, ImportError without the package."""
    try:
        import gguf
    except ImportError:
        raise MissingPackageError("GGUF files need the gguf package: pip install -e '.[demo]'") from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise GGUFError(f"{path} is not a GGUF file, or not whole: {error}") from None
    return reader


class GGUFWeights:
    """The weights of a GGUF file, as a `TensorSource`; all are read as fp32.

    Raises GGUFError for tensors that Llama has not, lacks, or has in another shape or encoding.
    """

    def __init__(self, path: Path, tensors: Sequence[Any], args: ModelArgs) -> None:
        import gguf

        self.path = path
        # Where each tensor lies, instead of the reader, which would keep the whole file mapped.
        self._where = {
            native_name(tensor.name): (
                tensor.tensor_type,
                tensor.data.dtype,
                int(tensor.data_offset),
                tensor.data.shape,
                tuple(int(n) for n in reversed(tensor.shape)),
            )
            for tensor in tensors
            if tensor.name != "rope_freqs.weight"  # checked with the parameters
        }
        parts = whole_parts(args)
        if "output.weight" not in self._where:
            del parts["output.weight"]
        check_names(path, self._where, parts, "the file's metadata")
        for name, part in parts.items():
            kind, *_, shape = self._where[name]
            if shape != part.shape:
                raise GGUFError(
                    f"{path}: {name} has the shape {shape}, where by the file's metadata {part.shape} belongs"
                )
            if kind not in DTYPES and kind not in gguf.quants._type_traits:
                raise GGUFError(f"{path}: {name} is {kind.name}, which the gguf package cannot dequantize")
        self.shapes = {name: part.shape for name, part in parts.items()}
        # Quantized numbers have no more than bf16's bits.
        kind = Counter(kind for kind, *_ in self._where.values() if kind != gguf.GGMLQuantizationType.F32)
        common = kind.most_common(1)[0][0] if kind else gguf.GGMLQuantizationType.F32
        self.dtype = DTYPES.get(common, torch.bfloat16)

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        import gguf

        kind, dtype, offset, stored_shape, shape = self._where[name]
        data: np.ndarray = np.memmap(self.path, dtype, "r", offset, stored_shape)
        if dim == 0 and span is not None:
            data, shape = data[slice(*span)], (span[1] - span[0], *shape[1:])
        values = torch.from_numpy(np.array(gguf.dequantize(data, kind), np.float32)).view(shape)
        return values if dim == 0 or span is None else values[:, slice(*span)]

    def release(self) -> None:
        """Nothing: each read maps what it needs."""


DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # by gguf.GGMLQuantizationType


def native_name(name: str) -> str:
    """blk.0.attn_q.weight to layers.0.attention.wq.weight."""
    match = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.weight", name)
    if not match or match[2] not in NAMES:
        raise GGUFError(f"the file has a tensor {name}, which a Llama model has not")
    return f"{(match[1] or '').replace('blk', 'layers')}{NAMES[match[2]]}.weight"


def read_params(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The `params.json` of a GGUF file. Raises GGUFError where the model is not one of this package's."""
    if (architecture := fields.get("general.architecture")) != "llama":
        raise GGUFError(f"the file's architecture is {architecture!r}; only 'llama' can be read")
    if fields.get("llama.expert_count"):
        raise GGUFError("the file has llama.expert_count, a mixture of experts, which cannot be read")
    try:
        params: dict[str, Any] = {
            "dim": fields["llama.embedding_length"],
            "n_layers": fields["llama.block_count"],
            "n_heads": fields["llama.attention.head_count"],
            "n_kv_heads": fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"]),
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            **feed_forward(fields["llama.embedding_length"], fields["llama.feed_forward_length"]),
            # stored as fp32: 9.99999975e-06 was 1e-05
            "norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            "rope_theta": float(f"{fields.get('llama.rope.freq_base', 10000.0):.6g}"),
        }
    except KeyError as error:
        raise GGUFError(f"the file lacks {error.args[0]}") from None
    head_dim = fields.get("llama.attention.key_length") or params["dim"] // params["n_heads"]
    if head_dim * params["n_heads"] != params["dim"]:
        params["head_dim"] = head_dim
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if fields.get(key, head_dim) != head_dim:
            raise GGUFError(f"the file has {key}={fields[key]}, other than {head_dim}, which cannot be read")
    if "rope_freqs.weight" in tensors:
        # What each frequency is divided by. The largest divisor is the factor; the rest must follow.
        divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
        params |= {"use_scaled_rope": True, "rope_scaling_factor": float(divisors.max())}
        plain = rope_frequencies(ModelArgs(**{**params, "use_scaled_rope": False}))
        if not torch.allclose(plain / divisors, rope_frequencies(ModelArgs(**params)), rtol=1e-4):
            raise GGUFError("the file has rope_freqs of another kind than Llama 3.1's, which cannot be read")
    elif fields.get("llama.rope.scaling.type", "none") != "none":
        raise GGUFError(
            f"the file has llama.rope.scaling.type={fields['llama.rope.scaling.type']}, which cannot be read"
        )
    return params


def read_tokenizer(fields: Mapping[str, Any]) -> Tokenizer | SentencePieceTokenizer:
    """A file's tokenizer. Raises GGUFError for a kind that isn't read."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind == "llama":
        return read_sentencepiece(fields)
    if kind != "gpt2" or pre not in PATTERNS:
        raise GGUFError(
            f"the file's tokenizer is {kind!r} with {pre!r}; 'llama' can be read, and 'gpt2' with "
            f"{', '.join(PATTERNS)}"
        )
    texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = {text: i for i, text in enumerate(texts) if types[i] in (CONTROL, USER_DEFINED)}
    to_byte = byte_alphabet()
    try:
        ranks = {
            bytes(to_byte[character] for character in text): i
            for i, text in enumerate(texts)
            if text not in special
        }
    except KeyError as error:
        raise GGUFError(
            f"the file's tokenizer has a character {error}, which is no byte of a token"
        ) from None
    # tiktoken merges the pair whose result has the lowest id first: that must be the merges' order.
    number = {text: i for i, text in enumerate(texts)}
    merged = [number["".join(merge.split(" "))] for merge in fields["tokenizer.ggml.merges"]]
    if any(a > b for a, b in pairwise(merged)):
        raise GGUFError("the file's merges are not in the order of their ids, which tiktoken cannot express")

    template = fields.get("tokenizer.chat_template", "")
    eos = texts[fields["tokenizer.ggml.eos_token_id"]]
    system = re.search(r"<\|im_start\|>system(?:\n|\\n)(.+?)<\|im_end\|>", template, re.DOTALL)
    name, bos = known_format(template), fields.get("tokenizer.ggml.bos_token_id")
    layout = Layout(
        special_tokens=special,
        pattern=PATTERNS[pre],
        bos=texts[bos] if bos is not None and fields.get("tokenizer.ggml.add_bos_token", True) else None,
        eos=eos,
        pad=texts[fields.get("tokenizer.ggml.padding_token_id", fields["tokenizer.ggml.eos_token_id"])],
        stop=[text for text in dict.fromkeys((eos, *ENDS)) if text in special],
        chat_format=name if name in ("llama3", "chatml") else "none",
        default_system=system[1] if system else "",
        context=fields.get("llama.context_length"),
        added=[
            text for text, i in special.items() if types[i] == USER_DEFINED and not _marks(text, template)
        ],
    )
    return Tokenizer.from_ranks(ranks, layout)


def _marks(text: str, template: str) -> bool:
    """Whether a token that files call user-defined is more than a word: it gives a chat its form."""
    return text in template or text in ENDS


def known_format(template: str) -> str | None:
    """The name of a chat format of this package that a template writes; None for others."""
    marks = {"chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "llama2": "<<SYS>>", "none": ""}
    return next((name for name, mark in marks.items() if mark in template and (mark or not template)), None)


def read_formatter(path: Path, fields: Mapping[str, Any], tokenizer: TextTokenizer) -> DialogFormat:
    """The chat format that a file's template writes, else the template itself."""
    template = fields.get("tokenizer.chat_template", "")
    if name := known_format(template):
        return chat_format(tokenizer, name)
    texts = fields["tokenizer.ggml.tokens"]
    bos, eos = (fields.get(f"tokenizer.ggml.{which}_token_id") for which in ("bos", "eos"))
    return ChatTemplate(
        tokenizer,
        template,
        path,
        None if bos is None else texts[bos],
        None if eos is None else texts[eos],
    )


def read_sentencepiece(fields: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The sentencepiece model that a GGUF file was made from, as far as encoding and decoding goes."""
    prefix = "tokenizer.ggml"
    texts, template = fields[f"{prefix}.tokens"], fields.get("tokenizer.chat_template", "")
    types = [
        CONTROL if kind == USER_DEFINED and _marks(text, template) else kind
        for text, kind in zip(texts, fields[f"{prefix}.token_type"], strict=True)
    ]
    if not (scores := fields.get(f"{prefix}.scores")):
        raise GGUFError("the file's tokenizer has no scores, without which its pieces cannot be merged")
    ids = {name: fields.get(f"{prefix}.{key}_token_id") for name, key in SENTENCEPIECE_IDS.items()}
    unk = ids["unk"] if ids["unk"] is not None else types.index(UNKNOWN) if UNKNOWN in types else 0
    # Field numbers are those of sentencepiece_model.proto.
    pieces = b"".join(
        _message(1, _text(1, text) + _float(2, score) + _int(3, UNKNOWN if i == unk else kind))
        for i, (text, score, kind) in enumerate(zip(texts, scores, types, strict=True))
    )
    trainer = (
        _int(3, 2) + _int(4, len(texts)) + _int(35, BYTE in types) + _int(40, unk) + _text(45, texts[unk])
    )
    for number, name in enumerate(("bos", "eos", "pad")):
        id_ = ids[name]
        # The package finds these by their pieces; a name that no piece has means that there is none.
        trainer += _int(41 + number, -1 if id_ is None else id_)
        trainer += _text(46 + number, f"<no {name}>" if id_ is None else texts[id_])
    normalizer = (
        _text(1, "identity")
        + _int(3, fields.get(f"{prefix}.add_space_prefix", True))
        + _int(4, fields.get(f"{prefix}.remove_extra_whitespaces", False))
        + _int(5, True)
    )
    tokenizer = SentencePieceTokenizer(pieces + _message(2, trainer) + _message(3, normalizer))
    if not fields.get(f"{prefix}.add_bos_token", True):
        tokenizer.bos_id = None
    stops = (fields.get(f"{prefix}.{name}_token_id") for name in ("eos", "eot", "eom"))
    named = (i for i, text in enumerate(texts) if text in ENDS)
    tokenizer.stop_tokens = list(dict.fromkeys(i for i in (*stops, *named) if i is not None))
    tokenizer.chat_format = known_format(template) or "none"
    return tokenizer


SENTENCEPIECE_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode())


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the highest bit set while more follow (Protocol Buffers)."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
