"""The tokenizer and chat format of a GGUF file, from its fields."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from llama.errors import ArgumentError, CheckpointError, shown
from llama.files import WORDS, is_kind
from llama.tokenizer import DialogFormat, Layout, SentencePieceTokenizer, TextTokenizer, Tokenizer
from llama.tokenizer.bpe import LLAMA3_PATTERN, byte_alphabet
from llama.tokenizer.chat_format import chat_format
from llama.tokenizer.template import ChatTemplate

# How each byte-level tokenizer splits text before merging, by GGUF's name for it.
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


LISTS = {"tokens": str, "merges": str, "token_type": int, "scores": float}


class GGUFError(CheckpointError):
    """A GGUF file that is not a Llama model, or has features that this package does not support."""


def read_tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer | SentencePieceTokenizer:
    """A file's tokenizer. Raises GGUFError if its kind is not supported."""
    check_lists(path, fields)
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind == "llama":
        return read_sentencepiece(path, fields)
    if kind != "gpt2" or pre not in PATTERNS:
        raise GGUFError(
            f"{path}: tokenizer {shown(kind)} with {shown(pre)} is not supported; supported: 'llama', "
            f"and 'gpt2' with {', '.join(PATTERNS)}"
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
            f"{path}: a token contains the character {error}, which does not stand for a byte"
        ) from None
    # tiktoken first merges the pair whose result has the lowest id, so merges must be in that order.
    number = {text: i for i, text in enumerate(texts)}
    try:
        merged = [number["".join(merge.split(" "))] for merge in fields["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise GGUFError(f"{path}: a merge yields {shown(error.args[0])}, which is not a token") from None
    if any(a > b for a, b in pairwise(merged)):
        raise GGUFError(f"{path}: the merges are not in the order of their ids, which tiktoken requires")

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
    try:
        return Tokenizer.from_ranks(ranks, layout)
    except ArgumentError as error:
        raise GGUFError(f"{path}: {error}") from None


def check_lists(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise GGUFError unless a file's token lists have the same length and its ids are within them."""
    needed = ("tokens", "token_type", "scores" if fields.get("tokenizer.ggml.model") == "llama" else "merges")
    for name in needed:
        values = fields.get(f"tokenizer.ggml.{name}")
        if not values or not all(is_kind(value, LISTS[name]) for value in values):
            raise GGUFError(
                f"{path} needs a list of {WORDS[LISTS[name]]}s as tokenizer.ggml.{name}; download it again"
            )
    tokens = fields["tokenizer.ggml.tokens"]
    for name in needed:
        if name != "merges" and len(fields[f"tokenizer.ggml.{name}"]) != len(tokens):
            raise GGUFError(f"{path} has {len(tokens)} tokens, but tokenizer.ggml.{name} has another length")
    if fields.get("tokenizer.ggml.eos_token_id") is None:
        raise GGUFError(f"{path} lacks tokenizer.ggml.eos_token_id; download it again")
    for name in ("bos", "eos", "eot", "eom", "padding", "unknown"):
        value = fields.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and not 0 <= value < len(tokens):
            raise GGUFError(f"{path}: {name}_token_id is {value}, but the ids are 0 to {len(tokens) - 1}")


def _marks(text: str, template: str) -> bool:
    """Whether a token that the file calls user-defined is part of the chat format, not just a word."""
    return text in template or text in ENDS


def known_format(template: str) -> str | None:
    """The name of the chat format in this package that a template implements; None for others."""
    marks = {"chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "llama2": "<<SYS>>", "none": ""}
    return next((name for name, mark in marks.items() if mark in template and (mark or not template)), None)


def read_formatter(path: Path, fields: Mapping[str, Any], tokenizer: TextTokenizer) -> DialogFormat:
    """The chat format that a file's template implements, else the template itself."""
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


def read_sentencepiece(path: Path, fields: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The sentencepiece model a GGUF file was made from, rebuilt as needed for encoding and decoding."""
    prefix = "tokenizer.ggml"
    texts, template = fields[f"{prefix}.tokens"], fields.get("tokenizer.chat_template", "")
    types = [
        CONTROL if kind == USER_DEFINED and _marks(text, template) else kind
        for text, kind in zip(texts, fields[f"{prefix}.token_type"], strict=True)
    ]
    if not (scores := fields.get(f"{prefix}.scores")):
        raise GGUFError(f"{path}: the tokenizer has no scores, which are needed to merge its pieces")
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
        # The package looks these up by piece; a name that no piece has means there is none.
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
    """Seven bits per byte, lowest first, with the high bit set if more follow (Protocol Buffers)."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
