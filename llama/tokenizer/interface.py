"""What a dialog is, and what every tokenizer and every chat format offers: types only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypedDict

from typing_extensions import NotRequired

Role = Literal["system", "user", "assistant", "tool", "ipython"]


class Message(TypedDict):
    """One message of a dialog.

    content: its text, or parts with images as `tokenizer.content` has them; of the assistant's it may be
        None where there are tool_calls.
    tool_calls: of the assistant, each {"id": …, "function": {"name": …, "arguments": JSON text or a dict}}.
    tool_call_id: of a tool, the call whose result this is.
    """

    role: Role
    content: Any
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


Dialog = Sequence[Message]


class TextTokenizer(Protocol):
    """What every kind of tokenizer offers. Text never becomes a special token unless asked to.

    n_words: size of the vocabulary. bos_id, eos_id, pad_id: ids; bos_id is None for models trained
    without. stop_tokens: ids that end an answer. special_tokens: text to id. chat_format: the name
    of the dialog format that goes with it. default_system: that format's own system message.
    """

    n_words: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_tokens: list[int]
    special_tokens: dict[str, int]
    chat_format: str
    default_system: str

    def encode(self, s: str, *, bos: bool, eos: bool) -> list[int]: ...

    def decode(self, t: Sequence[int]) -> str: ...

    def decode_bytes(self, t: Sequence[int]) -> bytes: ...


class DialogFormat(Protocol):
    """What every chat format offers."""

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The ids that ask for the assistant's next message. Raises ValueError for other dialogs."""

    def encode_next_turn(self, content: Any) -> list[int]:
        """The ids between an answer, as it was generated, and the answer to the user's next message.

        That is the end of the answer (the stop token is not part of it), the message, and the header of
        the next answer. A chat that keeps ids needs it: to encode an answer's text again may give others.
        """
