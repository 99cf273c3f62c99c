"""Reading a text that is still being written, character by character.

Each method is a generator: it yields when it needs more text, and is resumed when more has arrived. So
parsers are written as if the whole text were there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Parse = Generator[None, None, T]  # part of a parser: it yields when it needs more text

SPACE = " \t\r\n"
NAME = re.compile(r"[\w.-]")
LONGEST_NAME = 128


class NoMatchError(Exception):
    """The text does not match what was tried, or it ended."""


class Reader:
    """A text and a position in it. Its methods raise NoMatchError if the text does not match.

    text: all the text so far.
    at: the position, an index into it.
    ended: whether the text is complete.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def value(self) -> Parse[str]:
        """The text of a JSON value; only its strings and brackets are parsed."""
        start, depth = self.at, 0
        while True:
            char = yield from self.peek()
            if char == '"':
                yield from self.json_string()
            elif depth == 0 and (char in ",}]" or char in SPACE):
                break
            else:
                depth += (char in "{[") - (char in "}]")
                yield from self.next()
            if depth == 0 and char in '"}]':
                break
        return self.text[start : self.at]

    def json_string(self) -> Parse[str]:
        yield from self.space()
        start = self.at
        yield from self.expect('"')
        while (char := (yield from self.next())) != '"':
            if char == "\\":
                yield from self.next()
        try:
            return str(json.loads(self.text[start : self.at], strict=False))
        except ValueError:
            raise NoMatchError from None

    def python_string(self, quote: str) -> Parse[None]:
        quote = (yield from self.one_of(quote * 3)) or (yield from self.next())
        while not (yield from self.one_of(quote)):
            if (yield from self.next()) == "\\":
                yield from self.next()

    def name(self) -> Parse[str]:
        start = self.at
        while (char := (yield from self.peek())) and NAME.match(char) and self.at - start < LONGEST_NAME:
            self.at += 1
        if start == self.at:
            raise NoMatchError
        return self.text[start : self.at]

    def expect(self, characters: str) -> Parse[str]:
        """One of these characters, after any space."""
        yield from self.space()
        char = yield from self.next()
        if char not in characters:
            self.at -= 1
            raise NoMatchError
        return char

    def space(self) -> Parse[None]:
        while (char := (yield from self.peek())) and char in SPACE:
            self.at += 1

    def one_of(self, *texts: str) -> Parse[str]:
        """Skip and return the one of these texts that is here; else return ""."""
        while True:
            for text in texts:
                if self.text.startswith(text, self.at):
                    self.at += len(text)
                    return text
            rest = self.text[self.at :]
            if self.ended or not any(text.startswith(rest) for text in texts):
                return ""
            yield

    def next(self) -> Parse[str]:
        char = yield from self.peek()
        if not char:
            raise NoMatchError
        self.at += 1
        return char

    def peek(self) -> Parse[str]:
        """The next character, or "" at the end of the answer."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]
