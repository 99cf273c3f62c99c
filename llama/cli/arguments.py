"""A command's arguments, from its signature; all are checked before the command is called.

Parameters before a `*` may be passed by position, every parameter by its flag. A parameter whose
default is a dataclass stands for the fields of that class, so that options shared by commands are
defined once. Help comes from the docstring: one parameter a line, after `Args:`.
"""

import dataclasses
import difflib
import inspect
import json
import re
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from llama.errors import ArgumentError

FLAG = re.compile(r"--?([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
REQUIRED = inspect.Parameter.empty
# What a value of each type is called in errors and in help.
WORDS = {int: ("a whole number", "N"), float: ("a number", "X"), str: ("a string", "TEXT")}


class Option(NamedTuple):
    """One argument of a command.

    group: the parameter whose dataclass this is a field of, or None.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    positional: bool
    group: str | None = None

    @property
    def kinds(self) -> tuple[Any, ...]:
        union = get_origin(self.annotation) in (Union, UnionType)
        return get_args(self.annotation) if union else (self.annotation,)

    @property
    def choices(self) -> list[str]:
        """The possible values, if they can be listed."""
        listed = ["True", "False"] if bool in self.kinds else []
        return listed + [
            word for kind in self.kinds if get_origin(kind) is Literal for word in get_args(kind)
        ]

    def parse(self, text: str) -> Any:
        """The value of the text after a flag. Raises ArgumentError if it is invalid."""
        return None if NoneType in self.kinds and text.lower() == "none" else self.value(text)

    def value(self, text: str) -> Any:
        """Like `parse`, but "None" is ordinary text."""
        for kind in self.kinds:
            try:
                return _parse(kind, text)
            except (ValueError, TypeError, AttributeError):
                continue
        *most, last = self.choices or [_word(kind, 0) for kind in self.kinds if kind is not NoneType]
        listed = f"{', '.join(most)} or {last}" if most else last
        raise ArgumentError(f"{self.name} must be {listed}, not {text!r}")


def _parse(kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal and text in get_args(kind):
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if get_origin(kind) is tuple:
        values = json.loads(text) if text.startswith("[") else [text]
        return tuple(get_args(kind)[0](value) for value in values)
    if get_origin(kind) is dict:
        key, value = get_args(kind)
        return {key(k): value(v) for k, v in json.loads(text).items()}
    if kind in WORDS:
        return kind(text)
    raise ValueError


def _word(kind: Any, which: int) -> str:
    if get_origin(kind) is dict:
        return ("a JSON object", "JSON")[which]
    if get_origin(kind) is tuple:
        return f"{_word(get_args(kind)[0], which)}{(' or a JSON list', '')[which]}"
    return WORDS[kind][which]


def options_of(command: Callable[..., Any]) -> list[Option]:
    """The arguments of a command, in the order of its signature."""
    return [*_options(command)]


def _options(command: Callable[..., Any]) -> Iterator[Option]:
    types, helps = get_type_hints(command), _helps(command)
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(shared := parameter.default):
            yield from shared_options(shared, name)
        else:
            by_position = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            yield Option(name, types[name], parameter.default, helps.get(name, ""), by_position)


def shared_options(shared: Any, group: str | None = None) -> Iterator[Option]:
    """The fields of a dataclass as flags; their defaults are this instance's values."""
    types, helps = get_type_hints(type(shared)), _helps(type(shared))
    for field in dataclasses.fields(shared):
        yield Option(
            field.name, types[field.name], getattr(shared, field.name), helps[field.name], False, group
        )


def _helps(documented: Any) -> dict[str, str]:
    """What a docstring says about each parameter: one line each, continuation lines indented."""
    _, _, section = inspect.cleandoc(documented.__doc__ or "").partition("Args:\n")
    entries = re.split(r"^(\w+): ", textwrap.dedent(section), flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def parse(command: Callable[..., Any], words: Sequence[str], name: str) -> dict[str, Any]:
    """The keyword arguments that a command line passes to a command.

    name: of the command, as typed.
    Raises ArgumentError for an unknown or repeated flag, a flag without its value, a value of the wrong
    type, an extra argument, or a missing one.
    """
    known = {option.name: option for option in options_of(command)}
    by_position = [option for option in known.values() if option.positional]
    given: dict[str, Any] = {}
    left, places = deque(words), deque(by_position)
    while left:
        word = left.popleft()
        if flag := FLAG.fullmatch(word):
            option = known.get(flag[1].replace("-", "_"))
            if option is None:
                raise ArgumentError(
                    f"unknown argument {word.partition('=')[0]}{_nearest(flag[1], known, name)}"
                )
            text = flag[2]
            if text is None and left and _is_value(left[0], option):
                text = left.popleft()
            elif text is None and bool in option.kinds:
                text = "True"
            if text is None:
                raise ArgumentError(f"--{option.name} needs a value: {option.help}")
            if option.name in given:
                raise ArgumentError(f"{option.name} was given twice")
            given[option.name] = option.parse(text)
        else:
            while places and places[0].name in given:
                places.popleft()
            if not places:
                raise ArgumentError(_surplus(word, by_position, name))
            option = places.popleft()
            given[option.name] = option.value(word)
    if missing := [o.name for o in known.values() if o.default is REQUIRED and o.name not in given]:
        raise ArgumentError(f"{' and '.join(missing)} must be given; see {name} --help")
    return _grouped(command, known, given)


def _is_value(word: str, option: Option) -> bool:
    """Whether the word after a flag belongs to it."""
    if bool in option.kinds:  # also valid without a value
        return word.lower() in map(str.lower, option.choices)
    return FLAG.fullmatch(word) is None


def _surplus(word: str, by_position: Sequence[Option], name: str) -> str:
    if not by_position:
        return f"unexpected argument {word!r}: {name} takes flags only; see {name} --help"
    last = by_position[-1]
    hint = f"put the {last.name} in quotes if it has spaces" if str in last.kinds else "it takes no more"
    return f"unexpected argument {word!r} after {last.name}: {hint}; see {name} --help"


def _nearest(flag: str, known: dict[str, Option], name: str) -> str:
    near = difflib.get_close_matches(flag.replace("-", "_"), known, 1, 0.6)
    return f"; did you mean --{near[0]}?" if near else f"; {name} --help lists the flags"


def _grouped(command: Callable[..., Any], known: dict[str, Option], given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments, with shared options collected into their dataclasses."""
    arguments = {name: value for name, value in given.items() if known[name].group is None}
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(parameter.default):
            changes = {key: value for key, value in given.items() if known[key].group == name}
            arguments[name] = dataclasses.replace(parameter.default, **changes)  # type: ignore[type-var]
    return arguments


def usage(command: Callable[..., Any], name: str) -> str:
    """The help of a command."""
    summary = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:")[0]
    everything = options_of(command)
    positional = [option for option in everything if option.positional]
    places = [o.name.upper() if o.default is REQUIRED else f"[{o.name.upper()}]" for o in positional]
    lines = [f"usage: {' '.join([name, *places])} [--flag value ...]", "", summary]
    groups: dict[str | None, list[Option]] = {}
    for option in everything:
        groups.setdefault(option.group, []).append(option)
    for group, members in groups.items():
        if group is not None:
            shared = inspect.signature(command).parameters[group].default
            lines += ["", inspect.cleandoc(type(shared).__doc__ or "").partition("\n")[0]]
        else:
            lines.append("")
        lines += [line for option in members for line in _described(option)]
    return "\n".join(lines)


def _described(option: Option) -> list[str]:
    head = f"  {option.name if option.positional else _flag(option)}"
    shown = option.default not in (REQUIRED, None, "", False, (), {})
    text = f"{option.help} (default: {option.default})" if shown else option.help
    margin = " " * 28
    first, *rest = textwrap.wrap(text, 104, initial_indent=margin, subsequent_indent=margin)
    beside = len(head) < len(margin)
    return [head.ljust(len(margin)) + first.strip(), *rest] if beside else [head, first, *rest]


def _flag(option: Option) -> str:
    words = option.choices or [_word(kind, 1) for kind in option.kinds if kind is not NoneType]
    if option.annotation is bool:
        return f"--{option.name}"
    return f"--{option.name} {'|'.join(words)}"
