"""What calls return for each answer."""

from __future__ import annotations

from typing import TypedDict

from typing_extensions import NotRequired

from llama.moderation import Category
from llama.streaming import Answer, FinishReason
from llama.tokenizer import Message, TextTokenizer


class Scored(TypedDict, total=False):
    """With `logprobs`, and `top_logprobs` if asked for."""

    tokens: list[str]  # each token as text
    logprobs: list[float]
    top_logprobs: list[list[tuple[str, float]]]


class CompletionPrediction(Scored):
    generation: str
    finish_reason: FinishReason


class ChatPrediction(Scored):
    generation: Message
    finish_reason: FinishReason
    categories: NotRequired[list[Category]]  # what a guard objected to


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
