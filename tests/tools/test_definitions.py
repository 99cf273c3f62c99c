"""What a caller may give as a tool."""

from __future__ import annotations

from enum import Enum
from typing import Literal

import pytest
from typing_extensions import TypedDict

from llama.errors import ArgumentError
from llama.tools.definitions import call_function, describe_function, parse_tools


class Unit(Enum):
    celsius = "c"
    fahrenheit = "f"


class Tree(TypedDict):
    branches: list[Tree]


def plant(tree: Tree) -> None:
    """Plant a tree."""


def get_weather(city: str, days: int = 3, unit: Unit = Unit.celsius, tags: list[str] | None = None) -> str:
    """Tell the weather of a city.

    Not of villages.

    Args:
        city: its name,
            in any language
        days (int): how far ahead

    Returns:
        a sentence
    """
    return f"{city} {days} {unit.name} {tags}"


def test_a_function_is_described_by_its_signature_and_docstring():
    assert describe_function(get_weather)["function"] == {
        "name": "get_weather",
        "description": "Tell the weather of a city.\n\nNot of villages.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name, in any language"},
                "days": {"type": "integer", "default": 3, "description": "how far ahead"},
                "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                "tags": {
                    "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                    "default": None,
                },
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    }


def test_sphinx_docstrings_and_literal_types():
    def move(x: float, mode: Literal["fast", "slow"]) -> None:
        """Go.

        :param x: metres
        :param mode: how
        """

    function = describe_function(move)["function"]
    assert function["description"] == "Go."
    assert function["parameters"]["properties"] == {
        "x": {"type": "number", "description": "metres"},
        "mode": {"type": "string", "enum": ["fast", "slow"], "description": "how"},
    }


def test_arguments_are_converted_before_the_call():
    assert call_function(get_weather, {"city": "Ulm", "days": "4", "unit": "f"}) == "Ulm 4 fahrenheit None"
    with pytest.raises(
        ArgumentError, match=r"do not fit get_weather: city: Missing .*; days: Input should be"
    ):
        call_function(get_weather, {"days": "soon"})
    with pytest.raises(ArgumentError, match="village: Unexpected"):
        call_function(get_weather, {"city": "Ulm", "village": 1})


def test_a_type_that_contains_itself_is_refused():
    with pytest.raises(ArgumentError, match="the type Tree contains itself"):
        describe_function(plant)


def test_an_error_within_a_function_is_its_own():
    def fails(x: int) -> None:
        raise KeyError(x)

    with pytest.raises(KeyError):
        call_function(fails, {"x": 1})


def test_forms_of_a_definition():
    bare = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    tools = parse_tools([bare, {"type": "function", "function": {"name": "g"}}, "brave_search", get_weather])
    assert [(tool.name, tool.builtin) for tool in tools] == [
        ("f", False),
        ("g", False),
        ("brave_search", True),
        ("get_weather", False),
    ]
    assert tools[3].function is get_weather
    assert parse_tools(tools) == tools


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("brave_search", "tools must be a list, not str"),
        (["google"], "'google' is not a built-in tool; use one of brave_search"),
        ([{"name": "a b"}], "a tool's name must be 1 to 64 letters"),
        ([{"type": "retrieval", "function": {"name": "f"}}], "a tool must look like"),
        ([{"name": "f", "parameters": {"properties": ["a"]}}], "parameters must be a JSON Schema"),
        ([{"name": "f", "description": 1}], "description must be a string"),
        ([{"name": "f"}, {"name": "f"}], "two tools are named 'f'"),
        ([1], "got int"),
        ([lambda x: x], "a tool's name must be"),
        ([lambda *x: x], "positional-only or variadic"),
    ],
)
def test_others_are_refused(tools: list, says: str):
    with pytest.raises(ArgumentError, match=says):
        parse_tools(tools)
