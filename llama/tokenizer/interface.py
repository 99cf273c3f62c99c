"""What a dialog is, and the interfaces of tokenizers and chat formats: types only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypedDict

from typing_extensions import NotRequired

Role = Literal["system", "user", "assistant", "tool", "ipython"]


class Message(TypedDict):
    """One message of a dialog.

    content: its text, or parts with images, see `tokenizer.content`; None is allowed for an assistant
        message with tool_calls.
    tool_calls: the assistant's, each {"id": …, "function": {"name": …, "arguments": JSON text or a dict}}.
    tool_call_id: for a tool's message, the call whose result it is.
    """

    role: Role
    content: Any
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


Dialog = Sequence[Message]


class TextTokenizer(Protocol):
    """The interface of every tokenizer. Text never becomes a special token unless requested.

    n_words: size of the vocabulary.
    bos_id, eos_id, pad_id: ids; bos_id is None for models trained without one.
    stop_tokens: ids that end an answer.
    special_tokens: text to id.
    chat_format: the name of its dialog format.
    default_system: that format's own system message.
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
    """The interface of every chat format."""

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The ids that prompt for the assistant's next message. Raises ValueError for invalid dialogs."""

    def encode_next_turn(self, content: Any) -> list[int]:
        """The ids between a generated answer and the answer to the user's next message.

        These are the end of the answer (which excludes the stop token), the message, and the header of
        the next answer. A chat keeps ids, because re-encoding an answer's text may give different ones.
        """
