"""From a model's answer, as it is generated, to text and tool calls.

Models write calls in any format they were trained on, with anything around them, so one parser accepts
all formats: JSON objects, `<function=…>`, Python lists of calls, `name.call(…)` and code after
<|python_tag|>. Whatever turns out not to be a call of a known tool is text.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from llama.tools.literals import json_object, literal_to_json
from llama.tools.reader import NAME, SPACE, NoMatchError, Parse, Reader

FUNCTION, FUNCTION_END = "<function=", "</function>"
TAGS = ("<|python_tag|>", "<|python_start|>")
PYTHON_END = "<|python_end|>"
CANDIDATE = re.compile(r"[{\[<]")  # the first character of a call, or of a tag before one


@dataclass(frozen=True)
class Delta:
    """A final piece of an answer.

    content: text.
    call: which tool call this is part of, counting from 0; None for text.
    id: of the call, in its first piece; unique in the dialog.
    name: of the tool, complete, in the first piece of a call.
    arguments: a piece of JSON text.
    """

    content: str = ""
    call: int | None = None
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class ToolCall:
    """A call that a model made.

    id: by which a tool's message refers to the call.
    arguments: JSON text of an object, unless the answer was cut off within it.
    """

    id: str
    name: str
    arguments: str = ""

    def to_message(self) -> dict[str, Any]:
        """The call as an entry of a message's tool_calls."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass
class ParsedAnswer:
    """All pieces of an answer, combined."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.content += delta.content
        add_deltas(self.calls, [delta])


def add_deltas(calls: list[ToolCall], deltas: Iterable[Delta]) -> None:
    """Add new pieces to calls."""
    for delta in deltas:
        if delta.call is not None:
            if delta.name:
                calls.append(ToolCall(delta.id, delta.name))
            calls[delta.call].arguments += delta.arguments


def parse_answer(text: str, tools: Collection[str]) -> ParsedAnswer:
    """Parse a whole answer. tools: names of the tools that may be called."""
    parser, answer = ToolParser(tools), ParsedAnswer()
    for delta in [*parser.push(text), *parser.finish()]:
        answer.add(delta)
    return answer


class _CompleteError(Exception):
    """The rest of the answer is ignored."""


class ToolParser(Reader):
    """Reads an answer piece by piece.

    A call is tried wherever one may begin. Nothing of it is sent until its tool is known; if it turns out
    not to be a call, what was read so far is text and the search continues after it.

    closed: calls that are complete.
    """

    def __init__(self, tools: Collection[str], first: int = 0, one_call: bool = False) -> None:
        """tools: names of the tools that may be called; with "code_interpreter", code after a tag is a call.

        first: the number of calls in the dialog so far.
        one_call: whether everything after a call is ignored.
        """
        super().__init__()
        self.closed = 0
        self._first, self._one_call = first, one_call
        self._tools = frozenset(tools)
        self._start = 0  # text from here on is not content or a call yet
        self._failed = 0  # where the last attempt turned out not to be a call
        self._opened = 0  # calls begun
        self._raw_from: int | None = None  # unchanged arguments have been sent up to here
        self._out: list[Delta] = []
        self._run = self._answer()

    def push(self, text: str) -> list[Delta]:
        """Add more of the answer; returns the pieces that are final now."""
        self.text += text
        return self._advance()

    def finish(self) -> list[Delta]:
        """End the answer; returns the pieces that were held back."""
        self.ended = True
        return self._advance()

    @property
    def complete(self) -> bool:
        """Whether the rest of the answer is ignored."""
        return self._one_call and self.closed > 0

    def _advance(self) -> list[Delta]:
        with contextlib.suppress(_CompleteError):
            next(self._run, None)
        self._send_raw()
        out, self._out = self._out, []
        return out

    # -- the answer: text and calls in any order --

    def _answer(self) -> Parse[None]:
        between = True  # since the beginning or a call, only space and, after a call, separators
        while True:
            self.text, self.at, self._start = self.text[self._start :], self.at - self._start, 0
            while (
                between and (char := (yield from self.peek())) and char in SPACE + ";," * bool(self._opened)
            ):
                self.at += 1
            if not (yield from self.peek()):
                if not self._opened or not between:
                    self._release()
                return
            before, tag = self.at, ""
            while found := (yield from self.one_of(*TAGS, PYTHON_END)):
                tag = found
            tagged = tag in TAGS
            if tag:
                yield from self.space()
            if (yield from self._call(tagged, first=between and not self._opened)):
                between = True
                continue
            self._release(before)
            self._start = self.at  # without the tag
            if tagged and "code_interpreter" in self._tools:
                yield from self._code()
                between = True
            elif (yield from self.peek()):
                following = CANDIDATE.search(self.text, max(self._failed, self.at + 1))
                self.at = following.start() if following else len(self.text)
                self._release()
                between = False

    def _call(self, tagged: bool, first: bool) -> Parse[bool]:
        """Read a call, or a list of them; if there is none, read nothing and return False."""
        begin, opened = self.at, self._opened
        self._failed = begin
        try:
            char = yield from self.peek()
            if char == "{":
                yield from self._json_call()
            elif char == "[":
                yield from self._list()
            elif char == "<" and (yield from self.one_of(FUNCTION)):
                yield from self._function_tag()
            elif (tagged or first) and char and NAME.match(char):
                yield from self._python_call(bare=tagged)
            else:
                return False
        except NoMatchError:
            if self._opened > self.closed:  # too late to take back: close it as it is
                self._close()
            self._failed = self.at
            self.at = begin if self._opened == opened else self._start
        return self._opened > opened

    # -- the formats --

    def _json_call(self) -> Parse[None]:
        """{"name": …, "parameters": {…}} with the keys in any order, and perhaps others."""
        self.at += 1
        name, arguments, others, opened = "", "", False, self._opened
        while True:
            key = yield from self.json_string()
            yield from self.expect(":")
            yield from self.space()
            if key == "name" and not name:
                name = yield from self.json_string()
                self._check(name)
            elif key in ("parameters", "arguments") and not arguments and self._opened == opened:
                if name and (yield from self.peek()) == "{":
                    self._open(name)
                    yield from self._raw_object()
                else:
                    arguments = yield from self.value()
            elif name or key == "type":
                others = others or key != "type"
                yield from self.value()
            else:
                raise NoMatchError
            if (yield from self.expect(",}")) == "}":
                break
        if self._opened == opened:
            checked = json_object(arguments or "null")
            # An object with a name and other keys may be anything.
            if not name or checked is None or (others and not arguments):
                raise NoMatchError
            self._open(name)
            self._send(arguments=checked)
        self._close()

    def _list(self) -> Parse[None]:
        """[f(a=1), g()], or a list of JSON calls."""
        self.at += 1
        while True:
            yield from self.space()
            yield from self._json_call() if (yield from self.peek()) == "{" else self._python_call()
            if (yield from self.expect(",]")) == "]":
                self._start = self.at
                return

    def _python_call(self, bare: bool = True) -> Parse[None]:
        """f(a=1, b="x") or f.call(…); only the latter unless `bare`."""
        written = yield from self.name()
        name = written.removesuffix(".call")
        if written in self._tools and bare:
            name = written
        elif name == written:
            raise NoMatchError
        self._check(name)
        yield from self.expect("(")
        separator, opened = "{", self._opened
        while True:
            yield from self.space()
            if (yield from self.one_of(")")):
                break
            key = yield from self.name()
            yield from self.expect("=")
            if self._opened == opened:
                self._open(name)
            value = yield from self._python_value()
            self._send(arguments=f"{separator}{json.dumps(key, ensure_ascii=False)}: {value}")
            separator = ", "
            try:
                if (yield from self.expect(",)")) == ")":
                    break
            except NoMatchError:
                if not self.ended:  # no argument follows, but those before are complete
                    self._send(arguments="}")
                raise
        if self._opened == opened:
            self._open(name)
        self._send(arguments="}" if separator != "{" else "{}")
        self._close()

    def _function_tag(self) -> Parse[None]:
        """<function=f>{…}</function>, from the name on."""
        name = yield from self.name()
        self._check(name)
        yield from self.expect(">")
        yield from self.space()
        if (yield from self.peek()) == "{":
            self._open(name)
            yield from self._raw_object()
            yield from self.space()
            yield from self.one_of('"')  # which small models add
            yield from self.one_of(FUNCTION_END)
        elif (yield from self.one_of(FUNCTION_END)):
            self._open(name)
            self._send(arguments="{}")
        else:
            raise NoMatchError
        self._close()

    def _code(self) -> Parse[None]:
        """The rest of the answer, as an argument of the code interpreter."""
        self._open("code_interpreter")
        self._send(arguments='{"code": "')
        while (yield from self.peek()) and not (yield from self.one_of(PYTHON_END)):
            end = self.text.find("<", self.at + 1)
            piece = self.text[self.at : end if end >= 0 else len(self.text)]
            self._send(arguments=json.dumps(piece, ensure_ascii=False)[1:-1])
            self.at += len(piece)
        self._send(arguments='"}')
        self._close()

    # -- parts of the formats; they raise NoMatchError --

    def _raw_object(self) -> Parse[None]:
        """A JSON object, sent unchanged as it arrives."""
        self._raw_from = self.at
        yield from self.value()
        self._send_raw()
        self._raw_from = None

    def _python_value(self) -> Parse[str]:
        """A Python literal, converted to JSON."""
        start, depth = self.at, 0
        while True:
            char = yield from self.peek()
            if char and char in "'\"":
                yield from self.python_string(char)
            elif depth == 0 and char and char in ",)":
                return literal_to_json(self.text[start : self.at])
            else:
                yield from self.next()
                depth += (char in "([{") - (char in ")]}")

    def _check(self, name: str) -> None:
        if name not in self._tools:
            raise NoMatchError

    # -- final pieces --

    def _release(self, end: int | None = None) -> None:
        """Send what is not part of a call, up to `end`, as text."""
        end = self.at if end is None else end
        if end > self._start:
            self._out.append(Delta(content=self.text[self._start : end]))
            self._start = end

    def _open(self, name: str) -> None:
        self._out.append(Delta(call=self._opened, id=f"call_{self._first + self._opened}", name=name))
        self._opened += 1

    def _send(self, arguments: str) -> None:
        self._out.append(Delta(call=self._opened - 1, arguments=arguments))

    def _send_raw(self) -> None:
        if self._raw_from is not None and self.at > self._raw_from:
            self._send(self.text[self._raw_from : self.at])
            self._raw_from = self.at

    def _close(self) -> None:
        self._send_raw()
        self._raw_from = None
        self._start = self.at
        self.closed += 1
        if self.complete:
            raise _CompleteError
