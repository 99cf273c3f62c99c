"""Dialogs to token ids, in the format each family of chat models was trained on.

A message's text never becomes a special token: roles are checked against a list, and content is
encoded as ordinary text, whatever it looks like.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama.errors import ArgumentError, shown
from llama.tokenizer.content import IMAGE, is_parts
from llama.tokenizer.interface import Dialog, DialogFormat, Message, TextTokenizer


def check_dialog(dialog: Dialog, roles: Sequence[str], calls: bool = False, images: bool = False) -> None:
    """Raise ArgumentError unless every message of a dialog has a known role and text.

    calls: whether messages may have tool_calls, in which case they need no text.
    images: whether messages may contain images.
    """
    if isinstance(dialog, str | dict) or not isinstance(dialog, Sequence):
        raise ArgumentError(f"a dialog must be a list of messages, not {type(dialog).__name__}")
    if not dialog:
        raise ArgumentError("the dialog is empty: it needs at least one message")
    for message in dialog:
        check_message(message, roles, calls, images)


def check_message(message: Message, roles: Sequence[str], calls: bool = False, images: bool = False) -> None:
    made = message.get("tool_calls") if isinstance(message, dict) else None
    if made and not calls:
        raise ArgumentError(
            "this chat format does not support tool calls: leave tool_calls out of the messages"
        )
    if made and message.get("content") is None and message.get("role") in roles:
        return
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise ArgumentError(f'a message must look like {{"role": ..., "content": ...}}, not {message!r}')
    if message["role"] not in roles:
        raise ArgumentError(f"unknown role {message['role']!r}: use one of {', '.join(roles)}")
    if is_parts(content := message["content"]) and not isinstance(content, str):
        if not images:
            raise ArgumentError("this chat format does not support images: leave them out of the messages")
    elif not isinstance(content, str):
        raise ArgumentError(f"a message's content must be text, not {type(content).__name__}")


def parse_call(call: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and arguments of {"function": {"name": …, "arguments": JSON text or an object}}.

    Raises ArgumentError for anything else.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str):
        raise ArgumentError(
            f'a tool call must look like {{"function": {{"name": …, "arguments": …}}}}; got {call!r}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ArgumentError(
                f"the arguments of a call to {name} are not JSON ({error}): {arguments!r}"
            ) from None
    if not isinstance(arguments, Mapping):
        raise ArgumentError(f"the arguments of a call to {name} must be an object; got {arguments!r}")
    return name, arguments


def encode_parts(tokenizer: TextTokenizer, parts: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of text and images from `split_content`. Raises ArgumentError if there is no image token."""
    ids: list[int] = []
    for part in parts:
        if "text" in part:
            ids += tokenizer.encode(part["text"], bos=False, eos=False)
        elif IMAGE in tokenizer.special_tokens:
            ids.append(tokenizer.special_tokens[IMAGE])
        else:
            raise ArgumentError(f"this model's tokenizer has no {IMAGE} token: leave the images out")
    return ids


class ChatFormat:
    """Llama 3: a header with the role, two newlines, the content, <|eot_id|>.

    Text is stripped, but not beside images, as in Meta's code of either time.
    """

    roles = ("system", "user", "assistant", "tool", "ipython")

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_header(self, message: Message) -> list[int]:
        """<|start_header_id|>role<|end_header_id|>, two newlines. Raises ArgumentError for unknown roles."""
        check_message(message, self.roles, images=True)
        role = "ipython" if message["role"] == "tool" else message["role"]
        special = self.tokenizer.special_tokens
        return [
            special["<|start_header_id|>"],
            *self.tokenizer.encode(role, bos=False, eos=False),
            special["<|end_header_id|>"],
            *self.tokenizer.encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> list[int]:
        """A header, the content, and <|eot_id|>."""
        header = self.encode_header(message)
        content = message["content"]
        parts = [{"text": content.strip()}] if isinstance(content, str) else content
        ids = encode_parts(self.tokenizer, parts)
        return [*header, *ids, self.tokenizer.special_tokens["<|eot_id|>"]]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """<|begin_of_text|>, every message, and the answer's header."""
        check_dialog(dialog, self.roles, images=True)
        ids = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            ids += self.encode_message(message)
        return ids + self.encode_header({"role": "assistant", "content": ""})

    def encode_next_turn(self, content: Any) -> list[int]:
        """<|eot_id|>, the user's message, and the answer's header."""
        return [
            self.tokenizer.special_tokens["<|eot_id|>"],
            *self.encode_message({"role": "user", "content": content}),
            *self.encode_header({"role": "assistant", "content": ""}),
        ]


class ChatML:
    """<|im_start|>role, a newline, the unmodified content, <|im_end|>, a newline.

    default_system: the system message for dialogs without one, if not empty.
    """

    roles = ("system", "user", "assistant", "tool")

    def __init__(self, tokenizer: TextTokenizer, default_system: str = "") -> None:
        self.tokenizer = tokenizer
        self.default_system = default_system

    def encode_header(self, message: Message) -> list[int]:
        """<|im_start|>role and a newline. Raises ValueError for an unknown role."""
        check_message(message, self.roles)
        return [self.tokenizer.special_tokens["<|im_start|>"], *self._text(message["role"] + "\n")]

    def encode_message(self, message: Message) -> list[int]:
        """One message, including its closing <|im_end|> and newline."""
        check_message(message, self.roles)
        special = self.tokenizer.special_tokens
        # Role and content are between the same two special tokens, so they are encoded as one text.
        body = self._text(f"{message['role']}\n{message['content']}")
        return [special["<|im_start|>"], *body, special["<|im_end|>"], *self._text("\n")]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Every message, after the default system message if there is none, and the answer's header."""
        check_dialog(dialog, self.roles)
        if self.default_system and dialog[0]["role"] != "system":
            dialog = [{"role": "system", "content": self.default_system}, *dialog]
        ids = [token for message in dialog for token in self.encode_message(message)]
        return ids + self.encode_header({"role": "assistant", "content": ""})

    def encode_next_turn(self, content: Any) -> list[int]:
        """<|im_end|> and a newline, the user's message, and the answer's header."""
        return [
            self.tokenizer.special_tokens["<|im_end|>"],
            *self._text("\n"),
            *self.encode_message({"role": "user", "content": content}),
            *self.encode_header({"role": "assistant", "content": ""}),
        ]

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, eos=False)


class Llama2Chat:
    """Llama 2: `[INST] user [/INST] answer `, each such pair between its own BOS and EOS.

    A system message goes between <<SYS>> tags at the start of the first user message. The tags are
    ordinary text to the tokenizer, so content that contains one is refused.
    """

    roles = ("system", "user", "assistant")
    tags = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """All pairs, then the last user message. Raises ValueError if roles do not alternate."""
        check_dialog(dialog, self.roles)
        for message in dialog:
            if found := [tag for tag in self.tags if tag in message["content"]]:
                raise ArgumentError(
                    f"the {message['role']} message contains {found[0]}, which Llama 2's chat format "
                    "reserves; remove it from the content"
                )
        texts = [message["content"] for message in dialog]
        roles = [message["role"] for message in dialog]
        if roles[0] == "system" and len(roles) > 1:
            system = texts.pop(0)
            roles.pop(0)
            texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}"
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise ArgumentError(
                "Llama 2's chat format takes an optional system message, then alternating user and assistant "
                f"messages, ending with the user's; got {', '.join(m['role'] for m in dialog)}"
            )
        ids = []
        for user, answer in zip(texts[::2], texts[1::2], strict=False):
            pair = f"[INST] {user.strip()} [/INST] {answer.strip()} "
            ids += self.tokenizer.encode(pair, bos=True, eos=True)
        return ids + self.tokenizer.encode(f"[INST] {texts[-1].strip()} [/INST]", bos=True, eos=False)

    def encode_next_turn(self, content: Any) -> list[int]:
        """The space and EOS after an answer, and the user's message between BOS and [/INST]."""
        answer, spaced = (self.tokenizer.encode(text, bos=False, eos=True) for text in ("x", "x "))
        message: Message = {"role": "user", "content": content}
        return spaced[len(answer) - 1 :] + self.encode_dialog_prompt([message])


class NoChat:
    """The format of base models, which have none."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Raises ValueError, with what to use instead."""
        return self.encode_next_turn("")

    def encode_next_turn(self, content: Any) -> list[int]:
        """Raises ValueError, with what to use instead."""
        raise ArgumentError(
            "this is a base model, not trained to chat: use text_completion to continue a text, or load "
            "the chat model of the same family (named -chat in Llama 2, -Instruct since Llama 3)"
        )


NEEDED = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def chat_format(tokenizer: TextTokenizer, name: str | None = None) -> DialogFormat:
    """A format by name; by default the tokenizer's own."""
    formats: dict[str, Callable[[], DialogFormat]] = {
        "llama3": lambda: ChatFormat(tokenizer),
        "llama2": lambda: Llama2Chat(tokenizer),
        "chatml": lambda: ChatML(tokenizer, tokenizer.default_system),
        "none": lambda: NoChat(tokenizer),
    }
    name = name or tokenizer.chat_format
    if name not in formats:
        raise ArgumentError(f"unknown chat format {shown(name)}: use one of {', '.join(formats)}")
    if missing := [text for text in NEEDED.get(name, ()) if text not in tokenizer.special_tokens]:
        raise ArgumentError(f"the tokenizer has no {missing[0]}, which the {name} chat format needs")
    return formats[name]()
