"""Hugging Face's `tokenizer.json`, with the interface of this package's tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llama.errors import ArgumentError, CheckpointError, MissingPackageError
from llama.files import check_kinds, id_list, no_panic, read_json
from llama.tokenizer.bpe import byte_alphabet

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

# Types of the values read from tokenizer_config.json.
CONFIG: dict[str, tuple[type, ...]] = {
    **{"add_bos_token": (bool,), "model_max_length": (float,), "chat_template": (str, list)}
}


class HFTokenizer:
    """The tokenizer of a Hugging Face folder; its attributes are those of `TextTokenizer`.

    context: tokens the model was trained for, if the tokenizer's files say so.
    """

    chat_format = "none"
    default_system = ""

    def __init__(self, folder: Path, vocab_size: int = 0, eos_ids: Collection[int] = ()) -> None:
        """vocab_size: of the model, if it has more ids than the tokenizer. eos_ids: further ids that end
        an answer. Raises FileNotFoundError, ImportError if the tokenizers package is missing, or
        CheckpointError if a file is invalid."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}; download it again")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingPackageError(
                "tokenizer.json needs the tokenizers package: pip install -e '.[hf]'"
            ) from None
        read_json(path)  # limits the nesting, which the package does not
        try:
            with no_panic("it is damaged"):
                self.model = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise CheckpointError(f"{path} is not a tokenizer: {str(error)[:200]}") from None
        self.folder = folder
        self.model.no_truncation()
        self.model.no_padding()
        self.special_tokens: dict[str, int] = {
            token.content: i for i, token in self.model.get_added_tokens_decoder().items() if token.special
        }
        self._added = {i: token.content for i, token in self.model.get_added_tokens_decoder().items()}
        config = read_json(folder / "tokenizer_config.json")
        generation = read_json(folder / "generation_config.json")
        check_kinds(folder / "tokenizer_config.json", config, CONFIG)
        named = named_tokens(folder, config)
        bos_token, eos_token, pad = named["bos"], named["eos"], named["pad"]
        self.n_words = max(self.model.get_vocab_size(), vocab_size)
        with no_panic(f"{path} is damaged"):
            begins = self.model.encode("", add_special_tokens=True).ids
        bos = self.model.token_to_id(bos_token) if bos_token else None
        self.bos_id: int | None = bos if config.get("add_bos_token", bos in begins[:1]) else None
        stops = [self.model.token_to_id(eos_token)] if eos_token else []
        stops += id_list(folder / "generation_config.json", generation, "eos_token_id")
        # Chat models may end a turn with these, whatever their configuration says.
        stops += [*eos_ids, *(self.special_tokens.get(text) for text in ("<|eot_id|>", "<|eom_id|>"))]
        self.stop_tokens: list[int] = list(dict.fromkeys(i for i in stops if i is not None))
        if not self.stop_tokens:
            raise CheckpointError(
                f"{folder} names no eos_token: neither tokenizer_config.json nor generation_config.json does"
            )
        self.eos_id = self.stop_tokens[0]
        pad_id = self.model.token_to_id(pad) if pad else None
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        context = config.get("model_max_length")
        self.context: int | None = context if isinstance(context, int) and context < 10**9 else None

    def encode(self, s: str, *, bos: bool, eos: bool) -> list[int]:
        """Ids of a text, which never becomes a special token; bos, eos: add the id of begin or end."""
        if not isinstance(s, str):
            raise ArgumentError(f"only text can be encoded, not {type(s).__name__}")
        begin = [self.bos_id] if bos and self.bos_id is not None else []
        return [*begin, *self._encode(s, special=False), *([self.eos_id] if eos else [])]

    def encode_rendered(self, s: str) -> list[int]:
        """Ids of a template's output, in which special tokens are encoded as such."""
        return self._encode(s, special=True)

    def _encode(self, s: str, special: bool) -> list[int]:
        self.model.encode_special_tokens = not special
        valid = s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with no_panic("the tokenizer cannot encode this text"):
            ids: list[int] = self.model.encode(valid, add_special_tokens=False).ids
        return ids

    def decode(self, t: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        data = self.decode_bytes(t)
        if not self._byte_level:
            first = next((piece for token in t if (piece := self.model.id_to_token(token))), "")
            data = data[1:] if first.startswith("▁") else data
        return data.decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """Bytes of ids, each decoded by itself: a token may be part of a character.

        Ids within the vocabulary that have no token are empty. Raises ValueError for unknown ids.
        """
        return b"".join(self._piece(token) for token in t)

    def _piece(self, token: int) -> bytes:
        if not 0 <= token < self.n_words:
            raise ArgumentError(f"{token} is not a token id: ids run from 0 to {self.n_words - 1}")
        if token in self._added:
            return self._added[token].encode()
        piece = self.model.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(self._byte_level[character] for character in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:-1], 16)])
        return str(piece).replace("▁", " ").encode()

    @cached_property
    def _byte_level(self) -> dict[str, int]:
        """Characters to bytes, if pieces use the alphabet of byte-level tokenizers; else empty."""
        decoder = json.loads(self.model.decoder.__getstate__()) if self.model.decoder else {}
        kinds = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))]
        return byte_alphabet() if "ByteLevel" in kinds else {}


def named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str | None]:
    """The texts of the bos, eos and pad tokens in a folder's files; None for missing ones.

    config: its tokenizer_config.json, which takes precedence over special_tokens_map.json.
    Raises CheckpointError if one is neither text nor an object with text as its content.
    """
    found: dict[str, str | None] = {}
    for kind in ("bos", "eos", "pad"):
        for name, content in (("tokenizer_config", config), ("special_tokens_map", None)):
            path, key = folder / f"{name}.json", f"{kind}_token"
            content = read_json(path) if content is None else content
            check_kinds(path, content, {key: (str, dict)})
            token = content.get(key)
            if isinstance(token, dict):
                check_kinds(path, token, {"content": (str,)})
                token = token.get("content")
            found[kind] = token
            if key in content:
                break
    return found
