"""OpenAI's chat completions: https://platform.openai.com/docs/api-reference/chat."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from sse_starlette import ServerSentEvent
from typing_extensions import NotRequired, TypedDict

from llama.arguments import ChatOptions
from llama.engine import TopLogprobs
from llama.predictions import Answer
from llama.server.bodies import WHOLE, Content, Loose, Sampling, content_of, text_of
from llama.server.replies import SSE, Stream, event, new_id, service_of, whole
from llama.server.service import Generation, Service
from llama.tokenizer import Message, TextTokenizer
from llama.tools.parser import Delta

router = APIRouter(tags=["OpenAI"])


class FunctionCall(Loose):
    name: str
    arguments: str


class ToolCall(Loose):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Loose):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def plain(self) -> Message:
        """Convert to the library's message. Raises ArgumentError for content other than text and images."""
        role = "system" if self.role == "developer" else self.role
        content = content_of(self.content) if role == "user" else text_of(self.content)
        message: Message = {"role": role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(None, description="Ignored")
    verbosity: str | None = Field(None, description="Ignored")
    modalities: list[Literal["text"]] | None = Field(None, description="Ignored")

    def arguments(self) -> ChatOptions:
        """Convert to the library's arguments. Raises ArgumentError if any are not supported."""
        options: ChatOptions = {"logprobs": bool(self.logprobs), "top_logprobs": self.top_logprobs or 0}
        options.update(self.options())  # type: ignore[typeddict-item]
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        # Tools of other types run on OpenAI's own servers.
        if tools := [tool for tool in self.tools or () if tool.get("type") == "function"]:
            options["tools"] = tools
            options["tool_choice"] = self.tool_choice or "auto"
            options["parallel_tool_calls"] = self.parallel_tool_calls is not False
        return options


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    content: list[TokenLogprob]


class CalledFunction(TypedDict):
    name: str
    arguments: str


class MadeCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[MadeCall]]


class Choice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]


class PromptDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=SSE)
async def chat_completions(
    body: ChatRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Answer a dialog."""
    service.check_model(body.model)
    dialog = [message.plain() for message in body.messages]
    generation = await service.chat(dialog, body.arguments())
    if body.stream:
        return Stream(generation, _chunks(body, service, generation))
    return await whole(request, generation, lambda answers: _completion(service, generation, answers))


def usage_of(generation: Generation) -> Usage:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.new_tokens,
        "total_tokens": generation.prompt_tokens + generation.new_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def finite(logprob: float) -> float:
    """A log-probability that JSON can represent."""
    return max(logprob, -9999.0)


def _completion(service: Service, generation: Generation, answers: Sequence[Answer]) -> ChatCompletion:
    choices: list[Choice] = []
    for index, answer in enumerate(answers):
        message: AssistantMessage = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [call.to_message() for call in answer.calls]  # type: ignore[misc]
        tops = answer.top_logprobs or [[]] * len(answer.tokens)
        logprobs = [
            _logprob(service.llama.tokenizer, *token)
            for token in zip(answer.tokens, answer.logprobs, tops, strict=False)
        ]
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": {"content": logprobs} if logprobs else None,
                "finish_reason": answer.finish_reason,  # type: ignore[typeddict-item]
            }
        )
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.name,
        "choices": choices,
        "usage": usage_of(generation),
    }


def _logprob(tokenizer: TextTokenizer, token: int, logprob: float, top: TopLogprobs) -> TokenLogprob:
    def entry(token: int, logprob: float) -> TopLogprob:
        data = tokenizer.decode_bytes([token])
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}

    return {**entry(token, logprob), "top_logprobs": [entry(*other) for other in top]}


async def _chunks(
    body: ChatRequest, service: Service, generation: Generation
) -> AsyncIterator[ServerSentEvent]:
    head = {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": service.name,
    }
    if body.include_usage:
        head["usage"] = None  # in all chunks except the last

    def chunk(index: int, delta: dict[str, Any], **rest: Any) -> ServerSentEvent:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **rest}
        return event({**head, "choices": [choice]})

    for index in range(body.n or 1):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for news in generation.events():
        deltas: list[dict[str, Any]] = [{"content": news.text}] if news.text else []
        deltas += [{"tool_calls": [_delta(delta)]} for delta in news.tool_calls]
        scored: dict[str, Any] = {}
        if news.token is not None and news.logprob is not None:
            logprob = _logprob(service.llama.tokenizer, news.token, news.logprob, news.top_logprobs or [])
            scored = {"logprobs": {"content": [logprob]}}
            deltas = deltas or [{"content": ""}]
        for delta in deltas:
            yield chunk(news.index, delta, **scored)
            scored = {}
        if news.finish_reason:
            yield chunk(news.index, {}, finish_reason=news.finish_reason)
    if body.include_usage:
        yield event({**head, "choices": [], "usage": usage_of(generation)})
    yield ServerSentEvent("[DONE]", sep="\n")


def _delta(delta: Delta) -> dict[str, Any]:
    call: dict[str, Any] = {"index": delta.call, "function": {"arguments": delta.arguments}}
    if delta.name:
        call |= {"id": delta.id, "type": "function"}
        call["function"] = {"name": delta.name, "arguments": delta.arguments}
    return call
