"""Hugging Face chat templates, rendered by jinja2 in its sandbox.

The template's special tokens must reach the model as such, but those that a user typed must not. So if
a dialog contains the text of one, it is rendered with a stand-in character, which distinguishes it from
what the template itself wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama.errors import ArgumentError, CheckpointError, MissingPackageError, shown
from llama.files import check_kinds, read_json, read_text
from llama.tokenizer.chat_format import NoChat, check_dialog, parse_call
from llama.tokenizer.huggingface import CONFIG, HFTokenizer, named_tokens
from llama.tokenizer.interface import Dialog, DialogFormat, TextTokenizer
from llama.tokenizer.sandbox import environment, render


def find_template(folder: Path, tokenizer: TextTokenizer) -> DialogFormat:
    """The chat template of a Hugging Face folder for a tokenizer, or `NoChat` if it has none.

    A separate template file takes precedence over the configuration, which may contain several.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    check_kinds(path, config, CONFIG)
    template = config.get("chat_template")
    if isinstance(template, list):
        for entry in template:
            if not isinstance(entry, dict):
                raise CheckpointError(
                    f"{path}: chat_template must be a list of objects, not of {shown(entry)}"
                )
            check_kinds(path, entry, {"name": (str,), "template": (str,)})
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if (path := folder / "chat_template.jinja").is_file():
        template = read_text(path)
    if not template:
        return NoChat(tokenizer)
    named = named_tokens(folder, config)
    return ChatTemplate(tokenizer, template, folder, named["bos"], named["eos"])


class ChatTemplate:
    """A Hugging Face chat template, rendered by jinja2 in its sandbox."""

    roles = ("system", "user", "assistant", "tool", "ipython")

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: str,
        origin: Path,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> None:
        """origin: named in errors. bos_token, eos_token: the template's variables of these names.

        Raises ImportError if jinja2 is missing, CheckpointError if the template has a syntax error."""
        self.tokenizer = tokenizer
        self.origin, self.source = origin, template
        self.names = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        try:
            self.template = environment().from_string(template)
        except MissingPackageError:
            raise
        except Exception as error:  # jinja2's: a syntax error, or too deep recursion
            raise CheckpointError(f"the chat template of {origin} is not valid jinja2: {error}") from None

    @property
    def knows_tools(self) -> bool:
        """Whether the template mentions tools."""
        return bool(re.search(r"\btools\b", self.source))

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Sequence[Mapping[str, Any]] = (), builtin_tools: Sequence[str] = ()
    ) -> list[int]:
        """Ids of the rendered dialog, with the answer's header.

        tools: OpenAI function objects that the model may call.
        builtin_tools: names of tools that the model knows already.

        Raises ArgumentError if the template rejects the dialog or tries to leave its sandbox.
        """
        check_dialog(dialog, self.roles, calls=True, images=True)
        # A template must be able to test whether there are any.
        names = {"tools": list(tools) or None} | (
            {"builtin_tools": list(builtin_tools)} if builtin_tools else {}
        )
        return self._encode([_open_calls(message) for message in dialog], names=names)

    def encode_next_turn(self, content: Any) -> list[int]:
        """What the template writes between an answer and the answer to the user's next message."""
        mark = next(self._unused({*str(content)}))
        dialog: Dialog = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": mark},
            {"role": "user", "content": content},
        ]
        return self._encode(dialog, mark)

    def _encode(
        self, dialog: Sequence[Mapping[str, Any]], after: str = "", names: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Ids of a rendered dialog, or of the part after a mark. names: other template variables."""
        special = self.tokenizer.special_tokens
        names = {"messages": dialog, **(names or {})}
        texts: list[str] = []
        _map_texts(names, texts.append)
        if isinstance(self.tokenizer, HFTokenizer) and not any(s in text for s in special for text in texts):
            text = self._render(names)
            return self.tokenizer.encode_rendered(text.rpartition(after)[2] if after else text)
        # A private-use character replaces the first one of each special token that a user typed.
        used = {*"".join(texts)}
        firsts = sorted({text[0] for text in special})
        stands_for = dict(zip(self._unused(used), firsts, strict=False))
        stand_in = {character: private for private, character in stands_for.items()}
        any_special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        hidden = _map_texts(names, lambda text: any_special.sub(lambda m: stand_in[m[0][0]] + m[0][1:], text))
        text, ids, at = self._render(hidden), [], 0
        text = text.rpartition(after)[2] if after else text
        for match in [*any_special.finditer(text), None]:
            piece = text[at : match.start()] if match else text[at:]
            ordinary = "".join(stands_for.get(c, c) for c in piece)
            ids += self.tokenizer.encode(ordinary, bos=False, eos=False) if ordinary else []
            if match:
                ids.append(special[match[0]])
                at = match.end()
        return ids

    def _unused(self, used: Collection[str]) -> Iterator[str]:
        """Private-use characters that neither dialog nor template uses. Raises ArgumentError at the end."""
        for block in (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)):
            yield from (c for c in map(chr, block) if c not in used and c not in self.source)
        raise ArgumentError("the dialog uses every private-use Unicode character: remove some")

    def _render(self, names: Mapping[str, Any]) -> str:
        try:
            return render(
                self.template,
                {"tools": None, "documents": None, "add_generation_prompt": True, **self.names, **names},
            )
        except MemoryError:
            raise
        except Exception as error:  # a template can raise anything that Python's operators raise
            kind = type(error).__name__
            if kind == "SecurityError":
                raise ArgumentError(
                    f"the chat template of {self.origin} tries to leave its sandbox and was stopped: {error}"
                ) from None
            if kind == "OverflowError":
                raise ArgumentError(f"the chat template of {self.origin} was stopped: {error}") from None
            raise ArgumentError(f"the model's chat template rejects this dialog: {error}") from None


def _map_texts(value: Any, function: Callable[[str], Any]) -> Any:
    """Apply a function to every text in nested lists and dicts."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_map_texts(key, function): _map_texts(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, function) for item in value]
    return value


def _open_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: call arguments as objects, and no empty keys."""
    opened = {key: value for key, value in message.items() if value is not None and value != []}
    if "tool_calls" in opened:
        parsed = [(call, *parse_call(call)) for call in opened["tool_calls"]]
        opened["tool_calls"] = [
            {**call, "function": {"name": name, "arguments": arguments}} for call, name, arguments in parsed
        ]
    return opened
