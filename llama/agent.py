"""The loop around a model that calls tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama.errors import ArgumentError
from llama.tools import BUILTIN_TOOLS, Tool, call_function, parse_tools


def run_tools(
    chat: Callable[..., Mapping[str, Any]],
    dialog: Sequence[Mapping[str, Any]],
    functions: Sequence[Any],
    builtin_tools: Mapping[str, Callable[[str], Any]],
    max_turns: int,
    options: Mapping[str, Any],
) -> list[Any]:
    """See `Llama.run_tools`. chat: answers one dialog, with the options given."""
    tools = parse_tools([*functions, *builtin_tools])
    if missing := [tool.name for tool in tools if not tool.function and not tool.builtin]:
        raise ArgumentError(f"run_tools calls Python functions, and {missing[0]!r} is only described")
    by_name = {tool.name: tool for tool in tools}
    options = dict(options)
    choice = options.pop("tool_choice", "auto")
    messages: list[Any] = list(dialog)
    for turn in range(max_turns + 1):
        # After the last turn an answer in words is due; and what must be called must be called once.
        choice = "none" if turn == max_turns else choice if turn == 0 else "auto"
        prediction = chat(messages, tools=tools, tool_choice=choice, **options)
        messages.append(prediction["generation"])
        if prediction["finish_reason"] != "tool_calls":
            break
        for call in prediction["generation"]["tool_calls"]:
            result = _call(by_name[call["function"]["name"]], call["function"]["arguments"], builtin_tools)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return messages


def _call(tool: Tool, arguments: str, builtin_tools: Mapping[str, Callable[[str], Any]]) -> str:
    """The result of a call as text, or what is wrong with its arguments, which the model may mend."""
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
