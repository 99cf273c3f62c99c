"""Values written by models, converted to JSON."""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

WORDS = {"true": True, "false": False, "null": None, "none": None}


def literal_to_json(source: str) -> str:
    """A Python literal, or one with JSON's true, false and null, as JSON text.

    Anything else (a name, a sum) becomes a JSON string of its source: nothing is lost, and nothing is ever
    evaluated.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unknown escapes in strings
            node = ast.parse(source.strip(), mode="eval").body
        value = _value(node)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        text = json.dumps(source.strip(), ensure_ascii=False)
    # JSON's two surrogate escapes are one character.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in WORDS:
            return WORDS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            # A key of None means `**`, which `_value` rejects.
            return {_value(k) if k else _value(v): _value(v) for k, v in zip(keys, values, strict=True)}
    raise ValueError("not a literal")


def json_object(text: str) -> str | None:
    """The JSON text of an object, of null, or of a string that contains an object; else None."""
    try:
        value = json.loads(text, strict=False)
        if isinstance(value, str):
            text, value = value, json.loads(value, strict=False)
    except (ValueError, RecursionError):
        return None
    if value is None:
        return "{}"
    return text if isinstance(value, dict) else None
