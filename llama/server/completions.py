"""OpenAI's completions: https://platform.openai.com/docs/api-reference/completions."""

import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from sse_starlette import ServerSentEvent
from typing_extensions import TypedDict

from llama.arguments import Options
from llama.engine import TopLogprobs
from llama.errors import ArgumentError
from llama.predictions import Answer
from llama.server.bodies import WHOLE, Int, Sampling
from llama.server.chat_completions import Usage, finite, usage_of
from llama.server.replies import SSE, Stream, event, new_id, service_of, whole
from llama.server.service import Generation, Service
from llama.tokenizer import TextTokenizer

router = APIRouter(tags=["OpenAI"])


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[Int] | list[list[Int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    suffix: str | None = None

    def prompts(self) -> Sequence[str | list[int]]:
        """The list of prompts: texts or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    def arguments(self, stop_tokens: Sequence[int]) -> Options:
        """Convert to the library's arguments. Raises ArgumentError if any are not supported.

        stop_tokens: the tokenizer's. Programs that score a prompt request one more token and drop the
        last one, so they need it even if the answer would end there.
        """
        if self.suffix:
            raise ArgumentError("suffix is not supported: this model does not fill in the middle")
        if self.best_of not in (None, self.n or 1):
            raise ArgumentError("best_of must equal n: all answers are returned")
        options = self.options()
        options.setdefault("max_tokens", 16)  # OpenAI's default
        options["echo"] = bool(self.echo)
        options["logprobs"] = self.logprobs is not None
        options["top_logprobs"] = self.logprobs or 0
        if options["echo"] and options["logprobs"] and options["max_tokens"] == 1:
            options["logit_bias"] = {**options.get("logit_bias", {}), **dict.fromkeys(stop_tokens, -math.inf)}
        return options


class Logprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(TypedDict):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "content_filter"] | None


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


@router.post("/v1/completions", response_model=Completion, responses=SSE)
async def completions(
    body: CompletionRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Continue texts, or lists of token ids."""
    service.check_model(body.model)
    generation = await service.complete(body.prompts(), body.arguments(service.llama.tokenizer.stop_tokens))
    if body.stream:
        return Stream(generation, _chunks(body, service, generation))

    def completion(answers: Sequence[Answer]) -> Completion:
        choices = [_choice(body, service, i, answer) for i, answer in enumerate(answers)]
        return {**_head(service), "choices": choices, "usage": usage_of(generation)}  # type: ignore[typeddict-item]

    return await whole(request, generation, completion)


def _head(service: Service) -> dict[str, Any]:
    return {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.name,
    }


def _choice(body: CompletionRequest, service: Service, index: int, answer: Answer) -> Choice:
    logprobs = None
    if body.logprobs is not None:
        tops = answer.top_logprobs or [[] for _ in answer.tokens]
        scored = list(zip(answer.tokens, answer.logprobs, tops, strict=True))
        logprobs = _logprobs(service.llama.tokenizer, scored, first=bool(body.echo))
    reason: Any = answer.finish_reason
    return {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(
    tokenizer: TextTokenizer,
    tokens: Sequence[tuple[int, float, TopLogprobs]],
    offset: int = 0,
    first: bool = False,
) -> Logprobs:
    """Logprobs of tokens whose text begins at `offset`. first: whether the first token has none."""
    found: Logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, logprob, top in tokens:
        text = tokenizer.decode([token])
        found["tokens"].append(text)
        found["token_logprobs"].append(None if first else finite(logprob))
        # Several tokens may have the same text; the most likely one comes first.
        likely = {tokenizer.decode([i]): finite(p) for i, p in reversed(top)}
        found["top_logprobs"].append(None if first else likely)
        found["text_offset"].append(offset)
        offset += len(text)
        first = False
    return found


async def _chunks(
    body: CompletionRequest, service: Service, generation: Generation
) -> AsyncIterator[ServerSentEvent]:
    head = _head(service)
    if body.include_usage:
        head["usage"] = None
    offsets: dict[int, int] = {}
    async for news in generation.events():
        choice: dict[str, Any] = {"index": news.index, "text": news.text, "logprobs": None}
        if news.token is not None and news.logprob is not None:
            first, offset = bool(body.echo) and news.index not in offsets, offsets.get(news.index, 0)
            scored = (news.token, news.logprob, news.top_logprobs or [])
            choice["logprobs"] = _logprobs(service.llama.tokenizer, [scored], offset, first)
            offsets[news.index] = offset + len(choice["logprobs"]["tokens"][0])
        choice["finish_reason"] = news.finish_reason
        if news.text or choice["logprobs"] or news.finish_reason:
            yield event({**head, "choices": [choice]})
    if body.include_usage:
        yield event({**head, "choices": [], "usage": usage_of(generation)})
    yield ServerSentEvent("[DONE]", sep="\n")
