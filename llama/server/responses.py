"""OpenAI's responses: https://platform.openai.com/docs/api-reference/responses.

Nothing is stored: a client sends the whole conversation each time, and its prefix is reused.
"""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from sse_starlette import ServerSentEvent
from typing_extensions import TypedDict

from llama.arguments import ChatOptions
from llama.errors import ArgumentError
from llama.predictions import Answer
from llama.server.bodies import (
    WHOLE,
    Body,
    Content,
    JsonSchema,
    Loose,
    ResponseFormat,
    content_of,
    text_of,
)
from llama.server.replies import SSE, Stream, event, new_id, service_of, whole
from llama.server.service import Generation, Service
from llama.streaming import StreamEvent
from llama.tokenizer import Message

router = APIRouter(tags=["OpenAI"])


class Item(Loose):
    """A part of the conversation: a message, a function call, or its output."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content = None


class TextFormat(Loose):
    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class TextOptions(Loose):
    format: TextFormat | None = None


class ResponsesRequest(Body):
    model: str
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    previous_response_id: str | None = Field(None, description="Rejected: nothing is stored")
    background: bool | None = Field(None, description="Rejected if true")
    metadata: dict[str, Any] | None = None
    store: bool | None = Field(None, description="Ignored: nothing is stored")
    include: list[str] | None = Field(None, description="Ignored")
    reasoning: dict[str, Any] | None = Field(None, description="Ignored")
    truncation: str | None = Field(None, description="Ignored: a prompt that is too long is rejected")
    stream_options: dict[str, Any] | None = Field(None, description="Ignored")
    service_tier: str | None = Field(None, description="Ignored")
    user: str | None = Field(None, description="Ignored")
    safety_identifier: str | None = Field(None, description="Ignored")
    prompt_cache_key: str | None = Field(None, description="Ignored: prefixes are always reused")
    client_metadata: dict[str, Any] | None = Field(None, description="Ignored")

    def dialog(self) -> list[Message]:
        """Convert to the library's dialog. Raises ArgumentError for unsupported items."""
        dialog: list[Message] = []
        if self.instructions:
            dialog.append({"role": "system", "content": self.instructions})
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            if item.type == "message":
                role = item.role or "user"
                role = "system" if role == "developer" else role
                content = content_of(item.content) if role == "user" else text_of(item.content)
                dialog.append({"role": role, "content": content})
            elif item.type == "function_call":
                if not dialog or dialog[-1]["role"] != "assistant":
                    dialog.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments or "{}"}
                call = {"id": item.call_id, "type": "function", "function": function}
                dialog[-1].setdefault("tool_calls", []).append(call)
            elif item.type == "function_call_output":
                output = text_of(item.output)
                dialog.append({"role": "tool", "content": output, "tool_call_id": item.call_id or ""})
            elif item.type != "reasoning":
                raise ArgumentError(
                    f"input has an item of type {item.type!r}, which this server does not support"
                )
        return dialog

    def options(self) -> ChatOptions:
        """Convert to arguments of `Llama`. Raises ArgumentError if any are not supported."""
        if self.previous_response_id or self.background:
            raise ArgumentError("responses are not stored here: send the whole conversation as input")
        options: ChatOptions = {}
        if self.max_output_tokens is not None:
            options["max_tokens"] = self.max_output_tokens
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.top_p is not None:
            options["top_p"] = self.top_p
        # Tools of other types run on OpenAI's own servers.
        tools = [tool for tool in self.tools or () if tool.get("type") == "function"]
        if tools:
            keys = ("name", "description", "parameters")
            options["tools"] = [
                {"type": "function", "function": {key: tool[key] for key in keys if key in tool}}
                for tool in tools
            ]
            options["tool_choice"] = self.tool_choice or "auto"
            options["parallel_tool_calls"] = self.parallel_tool_calls is not False
        if self.text and (form := self.text.format):
            shape = ResponseFormat(type=form.type, json_schema=JsonSchema(schema=form.schema_))
            options.update(shape.shape())  # type: ignore[typeddict-item]
        return options


class InputDetails(TypedDict):
    cached_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Reply(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    metadata: dict[str, Any]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    temperature: float | None
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    max_output_tokens: int | None
    previous_response_id: None
    store: bool
    usage: Usage | None


@router.post("/v1/responses", response_model=Reply, responses=SSE)
async def responses(
    body: ResponsesRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    generation = await service.chat(body.dialog(), body.options())
    reply = _Reply(body, service)
    if body.stream:
        return Stream(generation, reply.stream(generation), error_name="error")

    def build(answers: Sequence[Answer]) -> Reply:
        (answer,) = answers
        if answer.text or not answer.calls:
            reply.output.append(_message(answer.text))
        reply.output += [_call(call.id, call.name, call.arguments) for call in answer.calls]
        return reply.build(generation, answer.finish_reason)

    return await whole(request, generation, build)


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(text: str) -> dict[str, Any]:
    item = {"type": "message", "id": new_id("msg_"), "status": "completed", "role": "assistant"}
    return {**item, "content": [_text(text)]}


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    item = {"type": "function_call", "id": new_id("fc_"), "status": "completed", "call_id": call_id}
    return {**item, "name": name, "arguments": arguments}


class _Reply:
    """One response as it is generated. output: the complete items."""

    def __init__(self, body: ResponsesRequest, service: Service) -> None:
        self.output: list[dict[str, Any]] = []
        self._body = body
        self._model = service.name
        self._id = new_id("resp_")
        self._created = int(time.time())
        self._open: dict[str, Any] | None = None  # the incomplete item
        self._events = 0

    def build(self, generation: Generation, reason: str | None = None) -> Reply:
        """The response so far. reason: why it ended, if it has."""
        body, status = self._body, "completed" if reason else "in_progress"
        details = None
        if reason in ("length", "content_filter"):
            status = "incomplete"
            details = {"reason": "max_output_tokens" if reason == "length" else "content_filter"}
        usage: Usage = {
            "input_tokens": generation.prompt_tokens,
            "input_tokens_details": {"cached_tokens": generation.cached_tokens},
            "output_tokens": generation.new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": generation.prompt_tokens + generation.new_tokens,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,  # type: ignore[typeddict-item]
            "error": None,
            "incomplete_details": details,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": list(self.output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "previous_response_id": None,
            "store": False,
            "usage": usage if reason else None,
        }

    async def stream(self, generation: Generation) -> AsyncIterator[ServerSentEvent]:
        """The events of a response; each item has its start and its end."""
        yield self._say("response.created", response=self.build(generation))
        yield self._say("response.in_progress", response=self.build(generation))
        async for news in generation.events():
            for item in self._news(news):
                yield item
            if news.finish_reason:
                if not self._open and not self.output:
                    for item in self._begin(_message("")):
                        yield item
                for item in self._finish():
                    yield item
                reply = self.build(generation, news.finish_reason)
                yield self._say(f"response.{reply['status']}", response=reply)

    def _say(self, name: str, /, **fields: Any) -> ServerSentEvent:
        self._events += 1
        return event({"type": name, "sequence_number": self._events - 1, **fields}, name)

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.output)}

    def _news(self, news: StreamEvent) -> Iterator[ServerSentEvent]:
        if news.text:
            if not self._open or self._open["type"] != "message":
                yield from self._begin(_message(""))
            self._part["text"] += news.text
            delta = {"content_index": 0, "delta": news.text, "logprobs": []}
            yield self._say("response.output_text.delta", **self._place, **delta)
        for call in news.tool_calls:
            if call.name:
                yield from self._begin(_call(call.id, call.name, ""))
            if call.arguments and self._open:
                self._open["arguments"] += call.arguments
                yield self._say("response.function_call_arguments.delta", **self._place, delta=call.arguments)

    @property
    def _part(self) -> dict[str, Any]:
        assert self._open is not None
        part: dict[str, Any] = self._open["content"][0]
        return part

    def _begin(self, item: dict[str, Any]) -> Iterator[ServerSentEvent]:
        yield from self._finish()
        self._open = item
        shown = {**item, "status": "in_progress", **({"content": []} if "content" in item else {})}
        yield self._say("response.output_item.added", output_index=len(self.output), item=shown)
        if "content" in item:
            yield self._say("response.content_part.added", **self._place, content_index=0, part=_text(""))

    def _finish(self) -> Iterator[ServerSentEvent]:
        if self._open is None:
            return
        if self._open["type"] == "message":
            part, place = self._part, {**self._place, "content_index": 0}
            yield self._say("response.output_text.done", **place, text=part["text"], logprobs=[])
            yield self._say("response.content_part.done", **place, part=part)
        else:
            arguments = {"name": self._open["name"], "arguments": self._open["arguments"]}
            yield self._say("response.function_call_arguments.done", **self._place, **arguments)
        yield self._say("response.output_item.done", output_index=len(self.output), item=self._open)
        self.output.append(self._open)
        self._open = None
