"""The tokenizer of Llama 3, and others with byte-pair ranks, using tiktoken.

A tiktoken `tokenizer.model` contains byte-pair ranks and nothing else. The rest (special tokens, split
pattern, chat format) is Llama 3's unless there is a `format.json` next to it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import tiktoken

from llama.errors import ArgumentError, CheckpointError, shown
from llama.files import check_kinds, is_kind, no_panic, read_json
from llama.tokenizer.spm import is_sentencepiece

# tiktoken panics on longer texts, and takes quadratic time on longer runs of spaces or non-spaces, so
# texts are split, at the same places as in Meta's tokenizer.
MAX_CHARS = 400_000


MAX_RUN = 25_000


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Ids start at the number of base tokens, 128,000. The rest, up to 256, are reserved.
LLAMA3_SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}


@dataclass(frozen=True)
class Layout:
    """What a `tokenizer.model` of byte-pair ranks does not contain. A `format.json` next to it may omit
    what is the same as in Llama 3. (Next to a sentencepiece model, it may only have a chat_format.)

    special_tokens: text to id. pattern: splits text into pieces, in tiktoken's regular expression syntax.
    bos, eos: texts of special tokens; bos is None for models trained without one.
    stop: the special tokens that end an answer. pad: one that no text contains.
    context: tokens the model was trained for.
    added: special tokens that are ordinary words, which any text may contain.
    """

    special_tokens: dict[str, int]
    pattern: str
    bos: str | None
    eos: str
    pad: str
    stop: list[str]
    chat_format: str
    default_system: str = ""
    context: int | None = None
    added: list[str] = field(default_factory=list)

    @staticmethod
    def llama3(num_base_tokens: int) -> Layout:
        reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
        names = [LLAMA3_SPECIAL_TOKENS.get(i) or next(reserved) for i in range(256)]
        return Layout(
            special_tokens={name: num_base_tokens + i for i, name in enumerate(names)},
            pattern=LLAMA3_PATTERN,
            bos="<|begin_of_text|>",
            eos="<|end_of_text|>",
            pad="<|finetune_right_pad_id|>",
            stop=["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
            chat_format="llama3",
        )

    @staticmethod
    def read(path: Path, default: Layout) -> Layout:
        """Read a layout file; omitted settings are those of `default`. Raises CheckpointError if invalid."""
        content = read_json(path)
        check_kinds(path, content, LAYOUT)
        if unknown := sorted(content.keys() - LAYOUT.keys()):
            raise CheckpointError(f"{path} has {shown(unknown[0])}, which is not a tokenizer layout setting")
        if nulls := sorted(key for key in content.keys() - {"bos", "context"} if content[key] is None):
            raise CheckpointError(f"{path}: {nulls[0]} must not be null")
        layout = replace(default, **content)
        if not all(is_kind(i, int) for i in layout.special_tokens.values()):
            raise CheckpointError(f"{path}: special_tokens must map texts to ids")
        named = [layout.eos, layout.pad, *layout.stop, *layout.added, *([layout.bos] if layout.bos else [])]
        for name in named:
            if not isinstance(name, str) or name not in layout.special_tokens:
                raise CheckpointError(f"{path}: {shown(name)} is not among its special_tokens")
        return layout

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


# What `format.json` may contain.
LAYOUT: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("pattern", "bos", "eos", "pad", "chat_format", "default_system"), (str,)),
    **{"special_tokens": (dict,), "stop": (list,), "added": (list,), "context": (int,)},
}


class Tokenizer:
    """The tokenizer of a checkpoint, using tiktoken; its attributes are those of `TextTokenizer`."""

    num_reserved_special_tokens = 256
    pat_str = LLAMA3_PATTERN

    def __init__(self, model_path: str | os.PathLike[str], layout: Layout | None = None) -> None:
        """model_path: a file of byte-pair ranks. layout: by default that of a `format.json` next to it,
        else Llama 3's. Raises FileNotFoundError, or ValueError for any other kind of file."""
        path = Path(model_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {path}: pass the path of a checkpoint's tokenizer.model"
            )
        ranks = read_ranks(path)
        beside = path.with_name("format.json")
        if layout is None:
            layout = Layout.llama3(len(ranks))
            layout = Layout.read(beside, layout) if beside.is_file() else layout
        try:
            self._set(ranks, layout)
        except ArgumentError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_ranks(cls, ranks: dict[bytes, int], layout: Layout) -> Tokenizer:
        """A tokenizer from byte-pair ranks in memory: token to id, in merge order."""
        tokenizer = cls.__new__(cls)
        tokenizer._set(ranks, layout)
        return tokenizer

    def _set(self, ranks: dict[bytes, int], layout: Layout) -> None:
        self.ranks = ranks
        self.layout = layout
        self.chat_format, self.default_system = layout.chat_format, layout.default_system
        self.special_tokens = dict(self.layout.special_tokens)
        self.pat_str = self.layout.pattern
        self.n_words = len(ranks) + len(self.special_tokens)
        ids = {*ranks.values(), *self.special_tokens.values()}
        if len(ids) < self.n_words or min(ids) or max(ids) >= self.n_words or b"" in ranks:
            raise ArgumentError(
                f"{len(ranks)} ranks and {len(self.special_tokens)} special tokens must have the ids 0 to "
                f"{self.n_words - 1}, each exactly once"
            )
        # A vocabulary that lacks a token for some byte would make tiktoken panic. Such bytes get a
        # rank after all others, which no merge uses and `encode` drops.
        missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
        self._every_byte = not missing
        with no_panic("the tokenizer cannot be built"):
            self.model = tiktoken.Encoding(
                "llama",
                pat_str=self.pat_str,
                mergeable_ranks=ranks | {byte: self.n_words + i for i, byte in enumerate(missing)},
                special_tokens=self.special_tokens,
            )
        self.bos_id = self.special_tokens[self.layout.bos] if self.layout.bos else None
        self.eos_id = self.special_tokens[self.layout.eos]
        self.pad_id = self.special_tokens[self.layout.pad]
        self.stop_tokens = [self.special_tokens[name] for name in self.layout.stop]

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Ids of a text; by default, text that looks like a special token is ordinary text.

        bos, eos: add the id of the begin or end of text.
        allowed_special: texts that become special tokens, or "all".
        disallowed_special: texts that raise ValueError, or "all".
        Lone surrogates become U+FFFD, as in UTF-8 decoders.
        """
        if not isinstance(s, str):
            raise ArgumentError(f"only text can be encoded, not {type(s).__name__}")
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        if self.layout.added and allowed_special != "all":
            allowed_special = {*allowed_special, *self.layout.added}
        for piece in _pieces(s):
            with no_panic("the tokenizer cannot encode this text"):
                ids += self.model.encode(
                    piece, allowed_special=allowed_special, disallowed_special=disallowed_special
                )
        if not self._every_byte:
            ids = [token for token in ids if token < self.n_words]
        return [*ids, self.eos_id] if eos else ids

    def decode(self, t: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        return self.decode_bytes(t).decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """Bytes of ids: a token may be part of a character. Raises ValueError for an unknown id."""
        for token in t:
            if not 0 <= token < self.n_words:
                raise ArgumentError(f"{token} is not a token id: ids run from 0 to {self.n_words - 1}")
        return self.model.decode_bytes(t)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Byte-pair ranks from lines of `base64 rank`. Raises ValueError for any other kind of file."""
    data = path.read_bytes()
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            if token in ranks:
                raise CheckpointError(f"{path}: line {number} repeats a token from an earlier line")
            ranks[token] = int(rank)
        except CheckpointError:
            raise
        except (ValueError, binascii.Error):
            kind = "it is a sentencepiece model" if is_sentencepiece(path) else "is it truncated?"
            raise ArgumentError(
                f"{path} is not a file of tiktoken ranks: line {number} is not `base64 rank`; {kind}"
            ) from None
    if not ranks:
        raise ArgumentError(f"{path} is empty: download it again")
    return ranks


def _pieces(s: str) -> Iterator[str]:
    for start in range(0, len(s), MAX_CHARS):
        text = s[start : start + MAX_CHARS]
        runs = [run.span() for run in re.finditer(r"\s+|\S+", text) if len(run[0]) > MAX_RUN]
        cuts = [0, *(i for a, b in runs for i in range(a + MAX_RUN, b, MAX_RUN)), len(text)]
        yield from (text[a:b] for a, b in pairwise(cuts))


def byte_alphabet() -> dict[str, int]:
    """The printable characters that represent bytes in byte-level tokenizers (Radford et al. 2019)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
