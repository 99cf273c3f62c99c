"""A jinja2 environment for untrusted templates: what transformers offers them, within limits.

jinja2's sandbox keeps templates away from Python, but lets them run and grow without limit. Here every
loop iteration, macro call, filter and operator checks time and size, so a template is stopped from
within, on any platform and in any thread.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from llama.errors import MissingPackageError

SECONDS = 5.0  # a template takes milliseconds
LARGEST = 2**24  # characters of a text, or a repeat count
WRITTEN = 2**26  # total characters that a template writes


class Budget:
    """What is left of one rendering's limits."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + SECONDS
        self.characters = WRITTEN

    def spend(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise OverflowError(f"it writes more than {WRITTEN:,} characters")
        if time.monotonic() > self.deadline:
            raise OverflowError(f"it takes longer than {SECONDS:g} s")


BUDGET: ContextVar[Budget] = ContextVar("BUDGET")


def render(template: Any, names: Mapping[str, Any]) -> str:
    """Render a template of `environment`. Raises OverflowError beyond the limits, and what jinja2 raises."""
    token = BUDGET.set(Budget())
    try:
        text: str = template.render(names)
        return text
    finally:
        BUDGET.reset(token)


def check_growth(values: tuple[Any, ...]) -> None:
    """Raise OverflowError if a result as large as the product of these would exceed the limits."""
    size = 1
    for value in values:
        if isinstance(value, str | bytes | list | tuple | dict):
            size *= max(1, len(value))
        elif isinstance(value, int):
            size *= max(1, abs(value))
    if size > LARGEST:
        raise OverflowError(f"it creates a value longer than {LARGEST:,} characters")
    BUDGET.get(Budget()).spend(0)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its arguments and its result."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if function.__name__ == "do_format":
            check_format(args[0])
        check_arguments((*args, *kwargs.values()))
        result = function(*args, **kwargs)
        check_growth((result if isinstance(result, str) else "",))
        return result

    return call


def check_arguments(values: tuple[Any, ...]) -> None:
    """Raise OverflowError if a text method or filter with these arguments could produce too much."""
    if sum(len(value) > 64 for value in values if isinstance(value, str)) > 1 or any(
        isinstance(value, int) and abs(value) > 64 for value in values
    ):
        check_growth(values)
    BUDGET.get(Budget()).spend(0)


def check_format(text: object) -> None:
    """Raise OverflowError if a format string has an implausible width."""
    if isinstance(text, str) and re.search(r"\d{6}", text):
        raise OverflowError("it formats a value to a width of more than 99,999 characters")


@functools.cache
def environment() -> Any:
    """The environment. Raises MissingPackageError if jinja2 is not installed."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
        from jinja2 import nodes
        from jinja2.visitor import NodeTransformer
    except ImportError:
        raise MissingPackageError("chat templates need the jinja2 package: pip install -e '.[hf]'") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %}, which marks answers for training: renders its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Limits(NodeTransformer):
        """Adds a check to the start of each loop and macro, and to concatenations."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            count = nodes.Call(nodes.EnvironmentAttribute("spend"), [nodes.Const(1 + size)], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count))
            return node

        visit_Macro = visit_CallBlock = visit_For

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return nodes.Call(nodes.EnvironmentAttribute("concatenate"), node.nodes, [], None, None)

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "+", "%"))

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = Limits().visit(super()._parse(source, name, filename))
            return tree.set_environment(self)

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            # The sandbox wraps `str.format`.
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
            if isinstance(owner, str):
                if function.__name__ in ("format", "format_map"):
                    check_format(owner)
                check_arguments((owner, *args, *kwargs.values()))
            return super().call(context, function, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                if isinstance(right, int | float) and abs(right) > 64:
                    raise OverflowError("it raises a number to a power above 64")
            elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
                check_growth((left, right))
            elif operator == "%" and isinstance(left, str):
                check_format(left)
                check_growth((left, *(right if isinstance(right, tuple) else (right,))))
            elif operator == "+" and isinstance(left, str) and isinstance(right, str):
                check_growth((len(left) + len(right),))
            BUDGET.get(Budget()).spend(0)
            return super().call_binop(context, operator, left, right)

        def spend(self, characters: int) -> None:
            BUDGET.get(Budget()).spend(characters)

        def concatenate(self, *values: Any) -> str:
            texts = [str(value) for value in values]
            check_growth((sum(map(len, texts)),))
            return "".join(texts)

    def written(value: Any) -> Any:
        BUDGET.get(Budget()).spend(len(value) if isinstance(value, str) else 1)
        return value

    made = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
        finalize=written,
    )
    made.globals.pop("lipsum")
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    made.filters["tojson"] = _to_json
    made.filters = {name: guarded(function) for name, function in made.filters.items()}
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise Refusal(message)


class Refusal(ValueError):
    """A template's own message that it rejects a dialog."""
