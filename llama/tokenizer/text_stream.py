"""From token ids to pieces of text: whole characters, and never part of a stop string."""

import codecs
from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, t: Sequence[int]) -> str: ...

    def decode_bytes(self, t: Sequence[int]) -> bytes: ...


class TextStream:
    """Turns token ids into pieces of text; joined, they are the decoded text up to a stop string.

    A token may end in the middle of a character or a stop string. What could be the beginning of either
    is held back until the next token decides. Bytes that are not UTF-8 become U+FFFD.

    stop: strings that end the text and are not part of it. The first complete one counts; if two end
    together, the longer one, however the tokens are split.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self.stopped: str | None = None  # the stop string that was hit
        self._tokenizer = tokenizer
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._held = ""

    def push(self, token: int, *, prompt: bool = False) -> str:
        """The text that is final now; empty once a stop string was hit.

        prompt: whether the token belongs to the prompt, in which stop strings are ignored.
        """
        data = self._tokenizer.decode_bytes([token])
        if data and not self._begun:
            self._begun = True
            # sentencepiece drops the space before a text's first word.
            if data.startswith(b" ") and not self._tokenizer.decode([token]).startswith(" "):
                data = data[1:]
        text = self._utf8.decode(data)
        return text if prompt else self._certain(text)

    def flush(self) -> str:
        """The text held back, once no more tokens follow."""
        text = self._certain(self._utf8.decode(b"", final=True))
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _certain(self, new: str) -> str:
        text = self._held + new
        if self.stopped is not None:
            return ""
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            return text[:at]
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        held = next(
            n
            for n in range(min(longest, len(text)), -1, -1)
            if n == 0 or any(stop.startswith(text[-n:]) for stop in self._stop)
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
