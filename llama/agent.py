"""The loop that runs a model's tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama.errors import ArgumentError
from llama.tokenizer import Dialog, Message
from llama.tools import BUILTIN_TOOLS, Tool, call_function, parse_tools


class ToolLoop:
    """The part of `Llama` that calls functions."""

    chat_completion: Callable[..., Any]

    def run_tools(
        self,
        dialog: Dialog,
        functions: Sequence[Any],
        max_turns: int = 10,
        *,
        builtin_tools: Mapping[str, Callable[[str], Any]] | None = None,
        **options: Any,
    ) -> list[Message]:
        """Answer a dialog, calling functions as often as the model asks.

        functions: Python functions that the model may call; results become text, or JSON.
        max_turns: maximum number of answers with calls; after that, the model must answer in text.
        builtin_tools: for Meta's built-in tools, functions that take a string, such as a search, or
            "code_interpreter" with a sandbox of your own: nothing here runs a model's code.
        options: those of `chat_completion`.

        Returns the dialog with calls, results and the answer. Arguments that do not fit a function are
        reported to the model; exceptions from functions propagate.
        """
        builtin = builtin_tools or {}
        tools = parse_tools([*functions, *builtin])
        if missing := [tool.name for tool in tools if not tool.function and not tool.builtin]:
            raise ArgumentError(f"run_tools needs Python functions, but {missing[0]!r} is only a description")
        by_name = {tool.name: tool for tool in tools}
        choice = options.pop("tool_choice", "auto")
        messages = list(dialog)
        for turn in range(max_turns + 1):
            # The answer after the last turn must be text; a tool choice is forced only in the first turn.
            choice = "none" if turn == max_turns else choice if turn == 0 else "auto"
            (prediction,) = self.chat_completion([messages], tools=tools, tool_choice=choice, **options)
            messages.append(prediction["generation"])
            if prediction["finish_reason"] != "tool_calls":
                break
            for call in prediction["generation"]["tool_calls"]:
                result = _call(by_name[call["function"]["name"]], call["function"]["arguments"], builtin)
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return messages


def _call(tool: Tool, arguments: str, builtin_tools: Mapping[str, Callable[[str], Any]]) -> str:
    """The result of a call as text, or what is wrong with its arguments, so that the model can retry."""
    try:
        values = json.loads(arguments, strict=False)
    except ValueError as error:
        return f"error: the arguments are not JSON ({error})"
    if tool.builtin:
        result = builtin_tools[tool.name](values.get(BUILTIN_TOOLS[tool.name], ""))
    else:
        try:
            result = call_function(tool.function, values)  # type: ignore[arg-type]
        except ArgumentError as error:
            return f"error: {error}"
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
