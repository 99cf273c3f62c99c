"""The formats in which Meta's models were trained to read about tools and to write their calls.

The texts in `prompts/` are what the models were trained on, byte for byte. The JSON of the tools is laid
out as by the generators in Meta's llama-models package but, unlike there, escaped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama.errors import ArgumentError
from llama.tools.definitions import BUILTIN_TOOLS, Tool

PROMPTS = Path(__file__).with_name("prompts")

Calls = Sequence[tuple[str, Mapping[str, Any]]]  # names and arguments


@dataclass(frozen=True)
class ToolFormat:
    """One format of prompt and call.

    prompt: file in `prompts/`, with a slot {tools} and perhaps {question}.
    place: where the text goes: at the start of the "system" message, in a "user" message of its own before
    the first question, or "around" that question.
    describe: returns the text for the slot {tools}.
    write: returns the calls of one message as the model writes them.
    """

    name: str
    prompt: str
    place: Literal["system", "user", "around"]
    describe: Callable[[Sequence[Tool]], str]
    write: Callable[[Calls], str]

    @property
    def parallel(self) -> bool:
        """Whether a message may contain several calls."""
        return self.write is _write_pythonic

    def fill(self, tools: Sequence[Tool], question: str = "") -> str:
        """The prompt for tools, including the question if this format has a slot for it."""
        text = (PROMPTS / self.prompt).read_bytes().decode()
        # Split before filling, so that braces in a tool or question are never mistaken for a slot.
        before, _, after = text.partition("{tools}")
        return before.replace("{question}", question) + self.describe(tools) + after


def _json_3_1(tools: Sequence[Tool]) -> str:
    def function(tool: Tool) -> dict[str, Any]:
        # Meta's generator gives every parameter the type object.
        properties = tuple(
            {name: {"type": "object", "description": schema.get("description", "")} | _keywords(schema)}
            for name, schema in _properties(tool).items()
        )
        parameters = {"type": "object", "properties": properties, "required": _required(tool)}
        return {"name": tool.name, "description": tool.description, "parameters": parameters}

    return "\n".join(lay_out({"type": "function", "function": function(tool)}) for tool in tools)


def _pythonic(tools: Sequence[Tool]) -> str:
    def function(tool: Tool) -> dict[str, Any]:
        properties = {
            name: {"type": schema.get("type", "any"), "description": schema.get("description", "")}
            | ({"default": str(schema["default"])} if schema.get("default") else {})
            | _keywords(schema)
            for name, schema in _properties(tool).items()
        }
        parameters = {"type": "dict", "required": _required(tool), "properties": properties}
        return {"name": tool.name, "description": tool.description, "parameters": parameters}

    return lay_out(tuple(function(tool) for tool in tools))


def _function_tag(tools: Sequence[Tool]) -> str:
    texts = []
    for tool in tools:
        parameters = _sorted_json(
            {
                name: _keywords(schema)
                | {
                    "description": schema.get("description", ""),
                    "param_type": schema.get("type", "any"),
                    "required": name in _required(tool),
                }
                for name, schema in _properties(tool).items()
            }
        )
        head = f'"name": {_string(tool.name)}, "description": {_string(tool.description)}'
        texts.append(
            f"Use the function '{tool.name}' to '{tool.description}':\n"
            f'{{{head}, "parameters": {parameters}}}'
        )
    return "\n\n".join(texts)


def _properties(tool: Tool) -> Mapping[str, Mapping[str, Any]]:
    return tool.parameters.get("properties") or {}


def _required(tool: Tool) -> list[str]:
    return list(tool.parameters.get("required") or ())


def _keywords(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that Meta's generators ignore (enum, items, …) but the model should see."""
    known = ("type", "description", "default", "title")
    return {key: value for key, value in schema.items() if key not in known}


def lay_out(value: Any, indent: int = 0) -> str:
    """JSON with mappings and tuples on several lines, four spaces per level, and lists on one line."""
    inner, outer = "\n" + " " * (indent + 4), "\n" + " " * indent
    if isinstance(value, Mapping):
        items = [f"{_string(key)}: {lay_out(item, indent + 4)}" for key, item in value.items()]
        return "{" + inner * bool(items) + ("," + inner).join(items) + outer + "}"
    if isinstance(value, tuple):
        return (
            "["
            + inner * bool(value)
            + ("," + inner).join(lay_out(v, indent + 4) for v in value)
            + outer
            + "]"
        )
    return _string(value)


def _string(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _sorted_json(value: Any) -> str:
    # jinja2's default encoding of a value, which Meta's generator used.
    escapes = {ord(character): f"\\u{ord(character):04x}" for character in "<>&'"}
    return json.dumps(value, sort_keys=True).translate(escapes)


def _write_json(calls: Calls) -> str:
    return "; ".join(
        _string({"type": "function", "name": name, "parameters": arguments}) for name, arguments in calls
    )


def _write_function_tag(calls: Calls) -> str:
    return "".join(f"<function={name}>{_string(arguments)}</function>" for name, arguments in calls)


def _write_pythonic(calls: Calls) -> str:
    def call(name: str, arguments: Mapping[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={python_literal(value)}' for key, value in arguments.items())})"

    return f"[{', '.join(call(name, arguments) for name, arguments in calls)}]"


def python_literal(value: Any) -> str:
    """A JSON value as Python writes it, with double quotes."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_string(k)}: {python_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(python_literal, value)) + "]"
    return str(value) if isinstance(value, bool) or value is None else _string(value)


def write_builtin(name: str, arguments: Mapping[str, Any]) -> str:
    """A call of a built-in tool, as it appears after <|python_tag|>."""
    if name == "code_interpreter":
        return str(arguments.get("code", ""))
    text = ", ".join(f"{key}={_string(value)}" for key, value in arguments.items())
    return f"{name}.call({text})"


FORMATS = {
    form.name: form
    for form in (
        ToolFormat("json", "tools-json-3.1.txt", "user", _json_3_1, _write_json),
        ToolFormat("function_tag", "tools-functiontag-3.1.txt", "user", _function_tag, _write_function_tag),
        ToolFormat("pythonic", "tools-pythonic-3.2.txt", "system", _pythonic, _write_pythonic),
        ToolFormat("pythonic_user", "tools-usermsg-3.3-4.txt", "around", _pythonic, _write_pythonic),
        ToolFormat("pythonic_user_3.2", "tools-usermsg-3.2.txt", "around", _pythonic, _write_pythonic),
        ToolFormat("llama4", "tools-llama4.txt", "system", _pythonic, _write_pythonic),
    )
}


def tool_format(name: str) -> ToolFormat:
    """A format by name. Raises ArgumentError for an unknown one."""
    if name not in FORMATS:
        raise ArgumentError(f"unknown tool_format {name!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def tool_response(ok: bool, stdout: str = "", stderr: str = "") -> str:
    """The text of a tool message with a program's output, in the format models were trained on.

    ok: whether the program ended without an error.
    stdout: its standard output.
    stderr: its standard error.
    """
    lines = ["completed" if ok else "failed"]
    lines += [f"[{name}]{text}[/{name}]" for name, text in (("stdout", stdout), ("stderr", stderr)) if text]
    return "\n".join(lines)


__all__ = ["BUILTIN_TOOLS", "FORMATS", "ToolFormat", "tool_format", "tool_response", "write_builtin"]
