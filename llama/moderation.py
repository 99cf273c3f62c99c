"""A guard around a chat: what it is shown, and how it filters a stream of events.

A guard is any object with a `check` method, such as `llama.Guard`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llama.errors import ArgumentError


@dataclass(frozen=True)
class Category:
    """A hazard category of a guard.

    code: such as "S1".
    name: such as "Violent Crimes".
    """

    code: str
    name: str


class Judgement(Protocol):
    """A guard's verdict on the last message of a dialog."""

    @property
    def safe(self) -> bool: ...

    @property
    def categories(self) -> Sequence[Category]: ...


class Moderator(Protocol):
    """Judges dialogs."""

    def check(self, dialog: Any, /) -> Any:
        """Return a `Judgement` for each of a list of dialogs.

        These have images only if the guard has a `version` with a true attribute `sees`.
        """


@dataclass(frozen=True)
class Review:
    """How one answer is checked.

    guard: the guard that checks it.
    before: the conversation that it answers.
    every: interval in tokens at which to check and release the answer; None: once, at its end.
    refused: the categories reported for the question, so that it is not answered; None if it was safe.
    """

    guard: Moderator
    before: Sequence[Mapping[str, Any]]
    every: int | None = None
    refused: tuple[Category, ...] | None = None

    def refuses(self, answer: str) -> tuple[Category, ...] | None:
        """The categories reported for an answer, or the beginning of one; None if it is safe."""
        if not answer.strip():
            return None
        shown = [dict(message) for message in self.before] or [{"role": "user", "content": ""}]
        if shown[-1]["role"] == "assistant":  # the answer continues it
            answer = shown.pop()["content"] + answer
        return judge(self.guard, [[*shown, {"role": "assistant", "content": answer}]])[0]


class EventReader(Protocol):
    """Turns the engine's events of a request into the caller's `StreamEvent`s."""

    def read(self, event: Any) -> Iterable[Any]: ...


class ReviewedReader:
    """Wraps another reader and holds back its events until a guard has checked them.

    cancel: ends the request if the guard objects.
    """

    def __init__(self, reader: EventReader, review: Review, cancel: Callable[[], object]) -> None:
        self._reader, self._review, self._cancel = reader, review, cancel
        self._held: list[Any] = []
        self._seen = ""  # the answer so far, including tool calls
        self._refused = False

    def read(self, event: Any) -> Iterator[Any]:
        """The events that the guard has found safe; or the request's end, if it objects."""
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
    """Check the questions of dialogs together, and say how to check their answers.

    dialogs: with content that is text, or parts of types "text" and "image".
    """
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ArgumentError(f"guard_every must be a whole number, 1 or more, or None, not {every!r}")
    sees = bool(getattr(getattr(guard, "version", None), "sees", False))
    before = [conversation(dialog, sees) for dialog in dialogs]
    verdicts = judge(guard, before)
    return [Review(guard, shown, every, verdict) for shown, verdict in zip(before, verdicts, strict=True)]


def judge(
    guard: Moderator, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[tuple[Category, ...] | None]:
    """For each conversation, the categories that a guard reports; None if it is safe or empty."""
    asked = [shown for shown in conversations if shown]
    judgements = iter(guard.check(asked) if asked else ())
    verdicts = [next(judgements) if shown else None for shown in conversations]
    return [None if verdict is None or verdict.safe else tuple(verdict.categories) for verdict in verdicts]


def conversation(dialog: Sequence[Mapping[str, Any]], images: bool = False) -> list[dict[str, Any]]:
    """What a guard is shown of a dialog: alternating messages of user and assistant, starting with the user.

    Consecutive messages of one role are merged; tool calls are shown as JSON.
    images: whether to show the user's images, as parts before the text.
    """
    shown: list[tuple[str, list[str], list[Any]]] = []  # roles, texts, images
    for message in dialog:
        role, content = message["role"], message.get("content") or ""
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        texts = [_text(content), *(f"{call['name']} {call['arguments']}" for call in calls)]
        text = "\n".join(text for text in texts if text)
        seen = _images(content) if images and role == "user" else []
        if role not in ("user", "assistant") or not (text or seen):
            continue
        if shown and shown[-1][0] == role:
            shown[-1][1].append(text)
            shown[-1][2].extend(seen)
        elif shown or role == "user":
            shown.append((role, [text], seen))
    joined = ((role, "\n\n".join(filter(None, texts)), seen) for role, texts, seen in shown)
    return [
        {"role": role, "content": [*seen, {"type": "text", "text": text}] if seen else text}
        for role, text, seen in joined
    ]


def _images(content: Any) -> list[Any]:
    """The parts of a message's content that are images."""
    return [] if isinstance(content, str) else [part for part in content if part.get("type") == "image"]


def _text(content: Any) -> str:
    """The text of a message's content, without images."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
