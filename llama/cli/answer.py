"""Printing an answer as it is generated, as plain text or rendered Markdown, or at its end as JSON."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, chain
from typing import Any, Protocol

from llama.errors import LlamaError, MissingPackageError
from llama.streaming import StreamEvent


class Writer(Protocol):
    """Prints the pieces of one answer; `close` ends its last line."""

    def write(self, text: str) -> None: ...

    def close(self) -> None: ...


class Plain:
    """Plain text."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        self._last = text[-1:] or self._last
        print(text, end="", flush=True)

    def close(self) -> None:
        if self._last != "\n":
            print(flush=True)


class Markdown:
    """Markdown rendered by rich: each block once complete; the last one again with every piece."""

    def __init__(self) -> None:
        from rich import console, live, markdown, segment

        self._block, self._gap = "", False
        self._console = console.Console()
        self._create_live = partial(
            live.Live, console=self._console, auto_refresh=False, transient=True, redirect_stdout=False
        )
        self._live = self._create_live()
        self._rendered = lambda: markdown.Markdown(self._block.strip("\n"))
        self._joined: Callable[[Any], Any] = lambda lines: segment.Segments(chain.from_iterable(lines))

    def write(self, text: str) -> None:
        text = self._block + text
        while end := block_end(text):
            self._block, text = text[:end], text[end:]
            self.close()
            self._gap = True
        self._block = text
        if text.strip():
            self._separate()
            lines = self._console.render_lines(self._rendered(), new_lines=True, pad=False)
            self._live.start()
            # If the block is taller than the screen, show its end.
            self._live.update(self._joined(lines[1 - self._console.height :]), refresh=True)

    def close(self) -> None:
        self._live.stop()
        self._live = self._create_live()  # a restarted one would erase the lines of its last block
        if self._block.strip():
            self._separate()
            self._console.print(self._rendered())
        self._block = ""

    def _separate(self) -> None:
        """Print the empty line between two blocks."""
        if self._gap:
            self._console.print()
        self._gap = False


def block_end(text: str) -> int:
    """Where the first Markdown block ends, after a blank line outside a code fence; 0 if it has not yet."""
    fenced = False
    lines = text.splitlines(keepends=True)
    for line, end in zip(lines, accumulate(map(len, lines)), strict=True):
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        if line == "\n" and not fenced and text[:end].strip():
            return end
    return 0


def writer(markdown: bool | str) -> Callable[[], Writer]:
    """How answers are printed. Raises MissingPackageError if `markdown` is True and rich is missing.

    markdown: True, False, or "auto" for a terminal that can move its cursor, if rich is installed.
    """
    there = find_spec("rich") is not None
    if markdown is True and not there:
        raise MissingPackageError('--markdown needs the rich package: pip install -e ".[chat]"')
    if markdown == "auto":
        markdown = there and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Markdown if markdown else Plain


def print_answer(events: Iterable[StreamEvent], write: Writer, as_json: bool = False) -> None:
    """Print a stream's only answer as it is generated, or as one JSON object when it has ended.

    Raises LlamaError if the request failed.
    """
    pieces, end = [], None
    for event in events:
        if event.error:
            raise LlamaError(event.error)
        pieces.append(event.text)
        if not as_json:
            write.write(event.text)
        end = event
    if not as_json:
        write.close()
    elif end and end.stats:
        answer = {"text": "".join(pieces), "finish_reason": end.finish_reason, **asdict(end.stats)}
        print(json.dumps(answer, ensure_ascii=False))
