"""Text and dialogs to token ids and back."""

import os
from pathlib import Path

from llama.tokenizer.bpe import Layout, Tokenizer
from llama.tokenizer.chat_format import ChatFormat
from llama.tokenizer.interface import Dialog, DialogFormat, Message, Role, TextTokenizer
from llama.tokenizer.spm import SentencePieceTokenizer, is_sentencepiece

__all__ = [
    "ChatFormat",
    "Dialog",
    "DialogFormat",
    "Layout",
    "Message",
    "Role",
    "SentencePieceTokenizer",
    "TextTokenizer",
    "Tokenizer",
    "load_tokenizer",
]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | SentencePieceTokenizer:
    """The tokenizer of a `tokenizer.model`, whose kind is recognised from its content.

    Raises FileNotFoundError, or ValueError for any other kind of file.
    """
    path = Path(path)
    if path.is_file() and is_sentencepiece(path):
        return SentencePieceTokenizer(path)
    return Tokenizer(path)
