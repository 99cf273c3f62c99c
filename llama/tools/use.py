"""The tool options of one chat call: which tools, in what format, and which of them must be called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from llama.errors import ArgumentError
from llama.tokenizer import Dialog, DialogFormat, TextTokenizer
from llama.tokenizer.chat_format import check_dialog
from llama.tokenizer.template import ChatTemplate
from llama.tools.definitions import Tool, parse_tools
from llama.tools.formats import FORMATS, ToolFormat, tool_format
from llama.tools.parser import ToolParser
from llama.tools.render import LLAMA_3, LLAMA_4, encode_turns, one_call_each, ordered, render

ROLES = ("system", "user", "assistant", "tool", "ipython")
# The formats that Meta's model families were trained with, by the family names used here.
FAMILIES = {"Llama 3.1 or 3.3": "json", "Llama 3.2": "pythonic", "Llama 3.2 Vision": "json"}


def default_format(family: str, formatter: DialogFormat) -> str | None:
    """How a checkpoint's prompts describe tools: "template", a name in `FORMATS`, or None if untrained."""
    if isinstance(formatter, ChatTemplate):
        return "template" if formatter.knows_tools else None
    return FAMILIES.get(family)


@dataclass(frozen=True)
class ToolUse:
    """The tools of one call.

    tools: all tools that were passed.
    choice: "auto", "none", "required", or the name of the tool that must be called.
    form: None for the checkpoint's own chat template.
    parallel: whether an answer may contain several calls.
    """

    tools: Sequence[Tool] = ()
    choice: str = "auto"
    form: ToolFormat | None = None
    parallel: bool = True

    @staticmethod
    def parse(
        tools: Sequence[Any] | None = None,
        tool_choice: Any = "auto",
        form: str | None = None,
        parallel: bool = True,
    ) -> ToolUse:
        """Check a call's options. form: None or "template" for the checkpoint's own chat template.

        Raises ArgumentError if they are invalid.
        """
        parsed = parse_tools(tools or ())
        choice = tool_choice
        if isinstance(tool_choice, Mapping):  # also OpenAI's {"type": "function", "function": {"name": …}}
            inner = tool_choice.get("function", tool_choice)
            choice = inner.get("name") if isinstance(inner, Mapping) else None
            if choice not in [tool.name for tool in parsed]:
                raise ArgumentError(f"tool_choice {tool_choice!r} does not name one of the tools")
        elif choice not in ("auto", "none", "required"):
            raise ArgumentError(
                f'tool_choice must be "auto", "none", "required" or {{"name": …}}, not {tool_choice!r}'
            )
        if choice not in ("auto", "none") and not parsed:
            raise ArgumentError(f"tool_choice={tool_choice!r} needs tools")
        if not isinstance(parallel, bool):
            raise ArgumentError(f"parallel_tool_calls must be True or False, not {parallel!r}")
        return ToolUse(parsed, choice, None if form in (None, "template") else tool_format(form), parallel)

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools that the prompt describes."""
        return () if self.choice == "none" else self.tools

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.offered)

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON Schema of the call that an answer must be, if a tool must be called."""
        if self.choice in ("auto", "none"):
            return None
        calls: list[dict[str, Any]] = []
        definitions: dict[str, Any] = {}
        for tool in self.tools:
            if self.choice in ("required", tool.name):
                parameters = {"additionalProperties": False, **tool.parameters}
                definitions |= parameters.pop("$defs", {})  # references are relative to the root
                call = {
                    "type": "object",
                    "properties": {"name": {"const": tool.name}, "parameters": parameters},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
                calls.append(call)
        return {"anyOf": calls, "$defs": definitions}

    def parser(self, dialog: Dialog) -> ToolParser | None:
        """A parser for the calls in an answer to a dialog; None if there can be none."""
        before = sum(len(message.get("tool_calls") or ()) for message in dialog)
        return ToolParser(self.names, before, one_call=not self.parallel) if self.offered else None

    def encode(self, dialog: Dialog, formatter: DialogFormat, tokenizer: TextTokenizer) -> list[int]:
        """The ids that prompt for the assistant's next message, or for the rest of its last one.

        Raises ArgumentError for a dialog that the model's chat format cannot represent.
        """
        check_dialog(dialog, ROLES, calls=True, images=True)
        last = dialog[-1]
        if len(dialog) > 1 and last["role"] == "assistant" and not last.get("tool_calls"):
            begun = tokenizer.encode(last["content"], bos=False, eos=False)
            return self.encode(dialog[:-1], formatter, tokenizer) + begun
        if not self.offered and not any(message.get("tool_calls") for message in dialog):
            return formatter.encode_dialog_prompt(dialog)
        if self.form and any(not isinstance(message.get("content") or "", str) for message in dialog):
            raise ArgumentError(
                f"tool_format={self.form.name!r} does not support images: leave out the images or the tools"
            )
        if self.form:
            return self._encode_by_form(dialog, self.form, formatter, tokenizer)
        if isinstance(formatter, ChatTemplate) and formatter.knows_tools:
            return self._encode_by_template(dialog, formatter)
        raise ArgumentError(
            "this checkpoint was not trained to call tools; to try anyway, pass tool_format=, "
            f"one of {', '.join(FORMATS)}"
        )

    def _encode_by_template(self, dialog: Dialog, formatter: ChatTemplate) -> list[int]:
        tools = [tool.definition for tool in self.offered if not tool.builtin]
        builtin = [tool.name for tool in self.offered if tool.builtin]
        try:
            return formatter.encode_dialog_prompt(ordered(dialog), tools, builtin)
        except ArgumentError:
            if all(len(message.get("tool_calls") or ()) < 2 for message in dialog):
                raise
            return formatter.encode_dialog_prompt(one_call_each(dialog), tools, builtin)

    def _encode_by_form(
        self, dialog: Dialog, form: ToolFormat, formatter: DialogFormat, tokenizer: TextTokenizer
    ) -> list[int]:
        turns = render(dialog, self.offered, form, date.today())
        if LLAMA_3[1] in tokenizer.special_tokens or LLAMA_4[1] in tokenizer.special_tokens:
            return encode_turns(turns, tokenizer)
        # Other chat formats receive the same texts as plain messages.
        result = "tool" if "tool" in getattr(formatter, "roles", ()) else "user"
        messages: list[Any] = [
            {"role": result if turn.role == "ipython" else turn.role, "content": turn.text} for turn in turns
        ]
        return formatter.encode_dialog_prompt(messages)
