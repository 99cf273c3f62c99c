"""A guard before and behind a chat: what it is shown, and what it does to a stream of events.

The guard itself is anything with `check`; `llama.Guard` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llama.errors import ArgumentError


@dataclass(frozen=True)
class Category:
    """What a guard objects to.

    code: such as "S1".
    name: such as "Violent Crimes".
    """

    code: str
    name: str


class Judgement(Protocol):
    """What a guard says of the last message of a dialog."""

    @property
    def safe(self) -> bool: ...

    @property
    def categories(self) -> Sequence[Category]: ...


class Moderator(Protocol):
    """What judges dialogs."""

    def check(self, dialog: Any, /) -> Any:
        """A `Judgement` for each of a list of dialogs."""


@dataclass(frozen=True)
class Review:
    """How one answer is checked.

    guard: who checks it.
    before: the conversation that it answers.
    every: tokens after which what there is of it is checked and shown; None: all of it at its end.
    refused: categories to which the guard objected in the question, so that there is no answer; None: none.
    """

    guard: Moderator
    before: Sequence[Mapping[str, Any]]
    every: int | None = None
    refused: tuple[Category, ...] | None = None

    def refuses(self, answer: str) -> tuple[Category, ...] | None:
        """The categories to which the guard objects in an answer, or the beginning of one; None if safe."""
        if not answer.strip():
            return None
        return judge(self.guard, [[*self.before, {"role": "assistant", "content": answer}]])[0]


class EventReader(Protocol):
    """What turns the engine's events of a request into a caller's, which are `StreamEvent`s."""

    def read(self, event: Any) -> Iterable[Any]: ...


class ReviewedReader:
    """Reads as another reader does, and holds back what a guard has not seen yet.

    cancel: ends the request, once the guard objects.
    """

    def __init__(self, reader: EventReader, review: Review, cancel: Callable[[], object]) -> None:
        self._reader, self._review, self._cancel = reader, review, cancel
        self._held: list[Any] = []
        self._seen = ""  # the answer so far, its calls included
        self._refused = False

    def read(self, event: Any) -> Iterator[Any]:
        """What an event brings, once the guard has no objection; or the end, if it has."""
        for brought in self._reader.read(event):
            if self._refused:
                return
            self._held.append(brought)
            calls = "".join(delta.name + delta.arguments for delta in brought.tool_calls)
            self._seen += brought.text + calls
            if brought.finish_reason or len(self._held) == self._review.every:
                yield from self._checked(brought)

    def _checked(self, last: Any) -> list[Any]:
        end: dict[str, Any]
        try:
            categories = self._review.refuses(self._seen)
            if categories is None:
                held, self._held = self._held, []
                return held
            end = {"finish_reason": "content_filter", "categories": categories, "error": None}
        except ArgumentError as error:  # such as a conversation that is too long for the guard
            message = f"prompt {last.index}: the guard cannot check the answer: {error}"
            end = {"finish_reason": "error", "error": message}
        self._refused = True
        self._cancel()
        nothing = {"token": None, "logprob": None, "top_logprobs": None, "tool_calls": (), "stop": None}
        return [replace(last, text="", **nothing, **end)]


def reviews(
    guard: Moderator, dialogs: Sequence[Sequence[Mapping[str, Any]]], every: int | None
) -> list[Review]:
    """The questions of dialogs, checked together, and how their answers will be."""
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ArgumentError(f"guard_every must be a whole number, 1 or more, or None, not {every!r}")
    before = [conversation(dialog) for dialog in dialogs]
    verdicts = judge(guard, before)
    return [Review(guard, shown, every, verdict) for shown, verdict in zip(before, verdicts, strict=True)]


def judge(
    guard: Moderator, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[tuple[Category, ...] | None]:
    """For each conversation the categories to which a guard objects; None if it is safe, or empty."""
    asked = [shown for shown in conversations if shown]
    judgements = iter(guard.check(asked) if asked else ())
    verdicts = [next(judgements) if shown else None for shown in conversations]
    return [None if verdict is None or verdict.safe else tuple(verdict.categories) for verdict in verdicts]


def conversation(dialog: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a guard is shown of a dialog: texts of user and assistant in turn, beginning with the user's.

    Messages of one role in a row become one; tool calls are shown as the JSON that they are.
    """
    shown: list[dict[str, Any]] = []
    for message in dialog:
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        texts = [
            _text(message.get("content") or ""),
            *(f"{call['name']} {call['arguments']}" for call in calls),
        ]
        text = "\n".join(text for text in texts if text)
        if message["role"] not in ("user", "assistant") or not text:
            continue
        if shown and shown[-1]["role"] == message["role"]:
            shown[-1]["content"] += "\n\n" + text
        elif shown or message["role"] == "user":
            shown.append({"role": message["role"], "content": text})
    return shown


def _text(content: Any) -> str:
    """The text of a content, without its images."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
