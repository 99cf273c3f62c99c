"""The tokenizer of LLaMA 1 and 2, using sentencepiece."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llama.errors import ArgumentError, CheckpointError, MissingPackageError
from llama.files import check_kinds, read_json


class SentencePieceTokenizer:
    """The tokenizer of LLaMA 1 and 2, using sentencepiece; its attributes are those of `TextTokenizer`.

    pad_id is -1: these models were trained without padding.
    """

    chat_format = "llama2"
    default_system = ""

    def __init__(self, model: str | os.PathLike[str] | bytes) -> None:
        """model: a sentencepiece model, or the path of one.

        Raises FileNotFoundError, ImportError if the sentencepiece package is missing, or ValueError if
        this is not a model.
        """
        try:
            import sentencepiece
        except ImportError:
            raise MissingPackageError(
                "the tokenizer of LLaMA 1 and 2 needs the sentencepiece package: pip install sentencepiece"
            ) from None
        where = "the tokenizer"
        if not isinstance(model, bytes):
            path = Path(model)
            where = str(path)
            if not path.is_file():
                raise FileNotFoundError(f"no tokenizer at {path}: pass the path of a tokenizer.model")
            model = path.read_bytes()
            if (beside := path.with_name("format.json")).is_file():
                content = read_json(beside)
                check_kinds(beside, content, {"chat_format": (str,)})
                if not content.get("chat_format"):
                    raise CheckpointError(f"{beside} does not name a chat_format")
                self.chat_format = content["chat_format"]
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise CheckpointError(f"{where} is not a sentencepiece model, or is truncated") from None
        self.proto = model
        self.n_words: int = self.model.vocab_size()
        self.bos_id: int | None = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.eos_id: int = self.model.eos_id()
        if self.eos_id < 0:
            raise CheckpointError(f"{where} has no end-of-text token; download it again")
        self.pad_id: int = self.model.pad_id()
        self.stop_tokens = [self.eos_id]
        try:
            pieces = [self.model.id_to_piece(i) for i in range(self.n_words)]
        except UnicodeDecodeError:
            raise CheckpointError(f"{where} contains a piece that is not UTF-8; download it again") from None
        self.special_tokens = {piece: i for i, piece in enumerate(pieces) if self.model.is_control(i)}

    def encode(self, s: str, *, bos: bool, eos: bool) -> list[int]:
        """Ids of a text, which never becomes a control token; bos, eos: add the id of begin or end."""
        if not isinstance(s, str):
            raise ArgumentError(f"only text can be encoded, not {type(s).__name__}")
        # sentencepiece needs UTF-8, which cannot encode lone surrogates.
        ids = self.model.encode(s.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        begin = [self.bos_id] if bos and self.bos_id is not None else []
        return [*begin, *ids, *([self.eos_id] if eos else [])]

    def decode(self, t: Sequence[int]) -> str:
        """Text of ids, without the space that sentencepiece adds before a text's first word."""
        data = self.decode_bytes(t)
        first = next((token for token in t if not self.model.is_control(token)), None)
        if first is not None and self.model.id_to_piece(first).startswith("▁"):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """Bytes of ids, each decoded by itself: words keep the space before them, even the first.

        A token may be part of a character; control tokens are empty. Raises ValueError for an unknown
        id.
        """
        return b"".join(self._piece(token) for token in t)

    def _piece(self, token: int) -> bytes:
        if not 0 <= token < self.n_words:
            raise ArgumentError(f"{token} is not a token id: ids run from 0 to {self.n_words - 1}")
        if self.model.is_control(token):
            return b""
        if self.model.is_unknown(token):
            return " ⁇ ".encode()  # as sentencepiece itself writes it
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("▁", " ").encode()


def is_sentencepiece(path: Path) -> bool:
    """Whether a file starts like a sentencepiece model, with the piece for unknown text."""
    with path.open("rb") as file:
        return b"<unk>" in file.read(64)
