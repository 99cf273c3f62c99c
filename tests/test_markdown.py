"""Markdown in a terminal: what a reader finds on the screen and above it once the answer has ended."""

import io
import sys

import pyte
import pytest

from llama.cli.answer import Markdown

WORDS = [" ".join(f"w{block}.{n}" for n in range(60)) for block in range(3)]
ANSWER = f"{WORDS[0]}\n\n- one\n- two\n\n```python\nprint(1)\n\nprint(2)\n```\n\n{WORDS[1]}\n\n**{WORDS[2]}**"


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 10_000], ids=["letters", "pieces", "whole"])
def test_nothing_is_lost_in_a_small_terminal(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = pyte.HistoryScreen(60, 10, history=1000)
    terminal = pyte.Stream(screen)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            terminal.feed(text.replace("\n", "\r\n"))
            return len(text)

    monkeypatch.setattr(sys, "stdout", Terminal())
    for name, value in {"TERM": "xterm", "COLUMNS": "60", "LINES": "10"}.items():
        monkeypatch.setenv(name, value)
    writer = Markdown()
    for start in range(0, len(ANSWER), size):
        writer.write(ANSWER[start : start + size])
    writer.close()
    above = ["".join(line[x].data for x in range(60)) for line in screen.history.top]
    lines = [line.strip() for line in (*above, *screen.display)]
    text = " ".join(line for line in lines if line)
    expected = [WORDS[0], "• one • two", "print(1)", "print(2)", WORDS[1], WORDS[2]]
    assert text == " ".join(expected)
    assert "" in lines[lines.index("• two") :]  # blocks stand apart
    assert lines[lines.index("• one") - 1] == ""
