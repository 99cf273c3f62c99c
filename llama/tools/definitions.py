"""What a model may call: functions described by JSON Schema, Python functions, and Meta's built-in tools."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama.errors import ArgumentError, MissingPackageError

# Tools that Meta's models were trained to call with <|python_tag|>; they need no definition in the prompt.
BUILTIN_TOOLS = {
    "brave_search": "query",
    "wolfram_alpha": "query",
    "photogen": "query",
    "code_interpreter": "code",
}
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """One tool of a call.

    definition: the OpenAI object, {"type": "function", "function": {"name": …, "parameters": …}}.
    function: what `run_tools` calls, if the tool was passed as a Python function.
    builtin: one of `BUILTIN_TOOLS`.
    """

    definition: Mapping[str, Any]
    function: Callable[..., Any] | None = None
    builtin: bool = False

    @property
    def name(self) -> str:
        return str(self.definition["function"]["name"])

    @property
    def description(self) -> str:
        return str(self.definition["function"].get("description") or "")

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON Schema of an object with the arguments."""
        return self.definition["function"].get("parameters") or {"type": "object", "properties": {}}


def parse_tools(tools: Sequence[Any]) -> list[Tool]:
    """Parse tools as a caller passes them.

    tools: each an OpenAI object, the function object within one, a Python function, the name of one of
    Meta's built-in tools, or a `Tool`.

    Raises ArgumentError for anything else, and for two tools with the same name; MissingPackageError for a
    Python function if pydantic is not installed.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ArgumentError(f"tools must be a list, not {type(tools).__name__}")
    parsed = [_parse(tool) for tool in tools]
    names = [tool.name for tool in parsed]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ArgumentError(f"two tools are named {twice!r}; names must be unique")
    return parsed


def _parse(tool: Any) -> Tool:
    if isinstance(tool, Tool):
        return tool
    if isinstance(tool, str):
        if tool not in BUILTIN_TOOLS:
            raise ArgumentError(f"{tool!r} is not a built-in tool; use one of {', '.join(BUILTIN_TOOLS)}")
        argument = BUILTIN_TOOLS[tool]
        schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
        return Tool({"type": "function", "function": {"name": tool, "parameters": schema}}, builtin=True)
    if isinstance(tool, Mapping):
        definition = tool if "function" in tool else {"type": "function", "function": tool}
        check_definition(definition)
        return Tool(definition)
    if callable(tool):
        definition = describe_function(tool)
        check_definition(definition)
        return Tool(definition, tool)
    raise ArgumentError(
        "a tool must be an OpenAI function object, a Python function, or the name of a built-in tool; "
        f"got {type(tool).__name__}"
    )


def check_definition(definition: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless an OpenAI object defines a function."""
    function = definition["function"]
    if not isinstance(function, Mapping) or definition.get("type", "function") != "function":
        raise ArgumentError(
            'a tool must look like {"type": "function", "function": {"name": …, "description": …, '
            f'"parameters": …}}}}; got {definition!r}'
        )
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ArgumentError(f"a tool's name must be 1 to 64 letters, digits, '_', '-' or '.'; got {name!r}")
    if not isinstance(function.get("description") or "", str):
        raise ArgumentError(f"tool {name!r}: description must be a string")
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {} if isinstance(parameters, Mapping) else None
    if not isinstance(properties, Mapping) or not all(isinstance(p, Mapping) for p in properties.values()):
        raise ArgumentError(
            f'tool {name!r}: parameters must be a JSON Schema like {{"type": "object", "properties": '
            f'{{"city": {{"type": "string"}}}}}}; got {parameters!r}'
        )


def describe_function(function: Callable[..., Any]) -> dict[str, Any]:
    """The OpenAI object for a Python function: its name, docstring, and the schema of its arguments.

    Descriptions of arguments come from docstring lines `name: text`, `name (type): text` or
    `:param name: text`. The text before the first such line is the function's description.
    """
    documentation = inspect.getdoc(function) or ""
    parameters = arguments_schema(function)
    description = documentation
    for name, schema in parameters["properties"].items():
        head = rf"^([ \t]*)(?::param )?\**{re.escape(name)}(?: \([^)\n]*\))?: *"
        if found := re.search(head + r"(.+(?:\n\1[ \t]+.+)*)", documentation, re.M):
            schema["description"] = " ".join(found[2].split())
            description = description[: found.start()] if found.start() < len(description) else description
    description = re.sub(r"\n\s*(Args|Arguments|Parameters):\s*$", "", "\n" + description).strip()
    name = getattr(function, "__name__", "")
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def arguments_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """JSON Schema of a function's arguments. Raises ArgumentError if a type has none."""
    pydantic = _pydantic()

    class Untitled(pydantic.json_schema.GenerateJsonSchema):  # type: ignore[misc, name-defined]
        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    name = getattr(function, "__name__", repr(function))
    try:
        schema: dict[str, Any] = pydantic.TypeAdapter(function).json_schema(schema_generator=Untitled)
    except pydantic.errors.PydanticUserError as error:
        raise ArgumentError(
            f"the arguments of {name!r} cannot be described by a JSON Schema: {error.message}"
        ) from None
    if schema.get("type") != "object":
        raise ArgumentError(
            f"{name!r} has positional-only or variadic arguments; a tool's arguments must have names"
        )
    # Prompts show arguments one by one, so shared definitions are written out in each.
    definitions = schema.pop("$defs", {})
    return {"type": "object", "properties": {}} | _written_out(schema, definitions)


def _written_out(schema: Any, definitions: Mapping[str, Any], within: tuple[str, ...] = ()) -> Any:
    if isinstance(schema, list):
        return [_written_out(item, definitions, within) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _written_out(value, definitions, within) for key, value in schema.items()}
    if isinstance(reference := schema.pop("$ref", None), str):
        name = reference.rpartition("/")[2]
        if name in within:
            raise ArgumentError(f"the type {name} contains itself; a tool's arguments must not")
        schema = _written_out(definitions[name], definitions, (*within, name)) | schema
        schema.pop("title", None)
    return schema


def call_function(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function with a model's arguments, converted to the types of its signature.

    Raises ArgumentError, with a message for the model, if they do not fit, and what the function raises.
    """
    pydantic = _pydantic()
    # Checked with a stand-in, so that an error inside the function is not mistaken for the model's.
    checker = pydantic.validate_call(functools.wraps(function)(lambda *args, **kwargs: (args, kwargs)))
    try:
        args, kwargs = checker(**arguments)
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise ArgumentError(f"these arguments do not fit {function.__name__}: {problems}") from None
    return function(*args, **kwargs)


def _pydantic() -> Any:
    try:
        import pydantic
        import pydantic.errors
        import pydantic.json_schema
    except ImportError:
        raise MissingPackageError(
            "Python functions as tools need the pydantic package: pip install -e '.[tools]'"
        ) from None
    return pydantic
