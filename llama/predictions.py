"""What calls return for each answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypedDict

from typing_extensions import NotRequired

from llama.engine import TopLogprobs
from llama.moderation import Category
from llama.streaming import FinishReason, StreamEvent
from llama.tokenizer import Message, TextTokenizer
from llama.tools.parser import ToolCall, add_deltas


@dataclass
class Answer:
    """All events of one request, combined. stop: the stop string that ended it, if any."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    calls: list[ToolCall] = field(default_factory=list)
    categories: tuple[Category, ...] = ()
    stop: str | None = None

    def add(self, event: StreamEvent) -> None:
        """Add an event. Raises RuntimeError if the request failed."""
        if event.finish_reason == "error":
            raise RuntimeError(event.error)
        self.text += event.text
        add_deltas(self.calls, event.tool_calls)
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        if event.top_logprobs is not None:
            self.top_logprobs.append(event.top_logprobs)
        if event.finish_reason:
            self.finish_reason, self.categories, self.stop = event.finish_reason, event.categories, event.stop

    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [call.to_message() for call in self.calls]
        return message


def collect(events: Iterator[StreamEvent]) -> list[Answer]:
    """Read a stream to its end. Raises RuntimeError if one of its requests failed."""
    answers: defaultdict[int, Answer] = defaultdict(Answer)
    for event in events:
        answers[event.index].add(event)
    return [answers[i] for i in sorted(answers)]


class Scored(TypedDict, total=False):
    """With `logprobs`, and `top_logprobs` if requested."""

    tokens: list[str]  # each token as text
    logprobs: list[float]
    top_logprobs: list[list[tuple[str, float]]]


class CompletionPrediction(Scored):
    generation: str
    finish_reason: FinishReason


class ChatPrediction(Scored):
    generation: Message
    finish_reason: FinishReason
    categories: NotRequired[list[Category]]  # the hazard categories that a guard reported


def completion_prediction(answer: Answer, tokenizer: TextTokenizer, logprobs: bool) -> CompletionPrediction:
    scored = _scored(answer, tokenizer, logprobs)
    return {"generation": answer.text, "finish_reason": answer.finish_reason, **scored}


def chat_prediction(answer: Answer, tokenizer: TextTokenizer, logprobs: bool) -> ChatPrediction:
    prediction: ChatPrediction = {"generation": answer.message(), "finish_reason": answer.finish_reason}
    prediction.update(_scored(answer, tokenizer, logprobs))  # type: ignore[typeddict-item]
    if answer.finish_reason == "content_filter":
        prediction["categories"] = list(answer.categories)
    return prediction


def _scored(answer: Answer, tokenizer: TextTokenizer, logprobs: bool) -> Scored:
    if not logprobs:
        return {}

    def text(token: int) -> str:
        return tokenizer.decode([token]) if token < tokenizer.n_words else ""  # an image

    scored: Scored = {"tokens": [text(token) for token in answer.tokens], "logprobs": answer.logprobs}
    if answer.top_logprobs:
        scored["top_logprobs"] = [[(text(t), p) for t, p in top] for top in answer.top_logprobs]
    return scored
