"""Anthropic's messages: https://docs.anthropic.com/en/api/messages."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from sse_starlette import ServerSentEvent
from typing_extensions import TypedDict

from llama.arguments import ChatOptions
from llama.errors import ArgumentError
from llama.predictions import Answer
from llama.server.bodies import WHOLE, Body, Loose, image_part
from llama.server.errors import AnthropicError, anthropic_error
from llama.server.replies import SSE, Stream, event, new_id, service_of, whole
from llama.server.service import Generation, Service
from llama.tokenizer import Message

router = APIRouter(
    tags=["Anthropic"], responses={"4XX": {"model": AnthropicError}, "5XX": {"model": AnthropicError}}
)


class Source(Loose):
    """The source of an image. Only base64 is accepted."""

    type: str
    media_type: str = ""
    data: str = ""


class Block(Loose):
    """A block of content: text, image, tool_use or tool_result, each with its own fields."""

    type: str
    text: str | None = None
    source: Source | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None


class InputMessage(Loose):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class OutputFormat(Loose):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Loose):
    format: OutputFormat | None = None


class CountRequest(Body):
    """The fields that make up a prompt."""

    model: str
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[Block] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = Field(None, description="Ignored")
    cache_control: dict[str, Any] | None = Field(None, description="Ignored: prefixes are always reused")
    context_management: dict[str, Any] | None = Field(None, description="Ignored")
    output_config: OutputConfig | None = None
    diagnostics: dict[str, Any] | None = Field(None, description="Ignored")
    user_profile_id: str | None = Field(None, description="Ignored")
    workspace_id: str | None = Field(None, description="Ignored")
    mcp_servers: list[dict[str, Any]] | None = Field(None, description="Ignored")

    def dialog(self) -> list[Message]:
        """Convert to the library's dialog. Raises ArgumentError for content other than text and images."""
        system: list[Message] = [{"role": "system", "content": _text(self.system)}] if self.system else []
        return system + [plain for message in self.messages for plain in _plain(message)]

    def tool_options(self) -> ChatOptions:
        """Convert to arguments of `Llama`."""
        # Tools with another type run on Anthropic's servers or are known only to its models.
        tools = [_function(tool) for tool in self.tools or () if tool.get("type", "custom") == "custom"]
        if not tools:
            return {}
        choice = self.tool_choice or {}
        kinds: dict[Any, Any] = {"any": "required", "tool": {"name": choice.get("name")}, "none": "none"}
        return {
            "tools": tools,
            "tool_choice": kinds.get(choice.get("type"), "auto"),
            "parallel_tool_calls": not choice.get("disable_parallel_tool_use"),
        }


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1), WHOLE]
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Annotated[int, Field(ge=0), WHOLE] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = Field(None, description="Ignored")
    service_tier: str | None = Field(None, description="Ignored")
    container: str | None = Field(None, description="Ignored")
    inference_geo: str | None = Field(None, description="Ignored")
    speed: str | None = Field(None, description="Ignored")

    def options(self) -> ChatOptions:
        """Convert to arguments of `Llama`."""
        options: ChatOptions = {**self.tool_options(), "max_tokens": self.max_tokens}
        if self.output_config and self.output_config.format:
            options["schema"] = self.output_config.format.schema_
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.top_p is not None:
            options["top_p"] = self.top_p
        if self.top_k:
            options["top_k"] = self.top_k
        if self.stop_sequences:
            options["stop"] = self.stop_sequences
        return options


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool in OpenAI's format."""
    function = {"name": tool.get("name"), "description": tool.get("description", "")}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema")}}


def _text(content: str | Sequence[Block] | None) -> str:
    """The text of some blocks. Raises ArgumentError for blocks that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    for block in content:
        if block.type != "text" or block.text is None:
            raise ArgumentError(f"content has a block of type {block.type!r}, which is not supported")
    return "\n".join(block.text or "" for block in content)


def _content(blocks: Sequence[Block]) -> str | list[dict[str, Any]]:
    """Convert text and images to the library's content. Raises ArgumentError for other blocks."""
    if not any(block.type == "image" for block in blocks):
        return _text(blocks)
    return [
        _image(block) if block.type == "image" else {"type": "text", "text": _text([block])}
        for block in blocks
    ]


def _image(block: Block) -> dict[str, Any]:
    source = block.source
    if source is None or source.type != "base64":
        raise ArgumentError("an image needs a source of type base64: nothing is fetched")
    return image_part(f"data:{source.media_type};base64,{source.data}")


def _plain(message: InputMessage) -> list[Message]:
    """Convert to the library's messages, where tool results are separate messages."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[Message] = [
        {"role": "tool", "content": _text(block.content), "tool_call_id": block.tool_use_id or ""}
        for block in message.content
        if block.type == "tool_result"
    ]
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": json.dumps(block.input or {})},
        }
        for block in message.content
        if block.type == "tool_use"
    ]
    known = ("tool_result", "tool_use", "thinking", "redacted_thinking")
    rest = [block for block in message.content if block.type not in known]
    if not rest and not calls:
        return results
    content = _content(rest) if message.role == "user" else _text(rest)
    plain: Message = {"role": message.role, "content": content}
    if calls:
        plain["tool_calls"] = calls
    return [*results, plain]


class Usage(TypedDict):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class Reply(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"] | None
    stop_sequence: str | None
    usage: Usage


class TokenCount(TypedDict):
    input_tokens: int


REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


@router.post("/v1/messages", response_model=Reply, responses=SSE)
async def messages(
    body: MessagesRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Answer a dialog."""
    service.check_model(body.model)
    generation = await service.chat(body.dialog(), body.options())
    if body.stream:
        return Stream(generation, _events(service, generation), anthropic_error, "error")

    def reply(answers: Sequence[Answer]) -> Reply:
        (answer,) = answers
        blocks: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text else []
        blocks += [_tool_use(call.id, call.name, json_object(call.arguments)) for call in answer.calls]
        return {
            **_head(service),
            **_end(answer.finish_reason, answer.stop),
            "content": blocks,
            "usage": _usage(generation),
        }  # type: ignore[typeddict-item]

    return await whole(request, generation, reply)


@router.post("/v1/messages/count_tokens", response_model=TokenCount)
async def count_tokens(body: CountRequest, service: Annotated[Service, Depends(service_of)]) -> TokenCount:
    """The number of tokens in a prompt, as counted by `messages`."""
    service.check_model(body.model)
    return {"input_tokens": len(await service.encode(body.dialog(), body.tool_options()))}


def _head(service: Service) -> Any:
    return {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": service.name}


def _end(reason: str, stop: str | None) -> Any:
    return {"stop_reason": "stop_sequence" if stop else REASONS[reason], "stop_sequence": stop}


def _usage(generation: Generation) -> Usage:
    return {
        "input_tokens": generation.prompt_tokens - generation.cached_tokens,
        "output_tokens": generation.new_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": generation.cached_tokens,
    }


def _tool_use(id: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": arguments}


def json_object(text: str) -> dict[str, Any]:
    """The object in a JSON text; empty if the text was cut off."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


async def _events(service: Service, generation: Generation) -> AsyncIterator[ServerSentEvent]:
    """Consecutive content blocks, each with its start and stop event."""

    def say(type: str, **rest: Any) -> ServerSentEvent:
        return event({"type": type, **rest}, type)

    usage = _usage(generation)
    head = {**_head(service), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    yield say("message_start", message=head)
    block: dict[str, Any] | None = None
    index = -1
    async for news in generation.events():
        texts = (
            [({"type": "text", "text": ""}, {"type": "text_delta", "text": news.text})] if news.text else []
        )
        calls = [
            (
                _tool_use(delta.id, delta.name, {}) if delta.name else None,
                {"type": "input_json_delta", "partial_json": delta.arguments},
            )
            for delta in news.tool_calls
        ]
        for begins, change in [*texts, *calls]:
            if begins is not None and (block is None or block["type"] != "text" or begins["type"] != "text"):
                if block is not None:
                    yield say("content_block_stop", index=index)
                block, index = begins, index + 1
                yield say("content_block_start", index=index, content_block=block)
            if change.get("text") or change.get("partial_json"):
                yield say("content_block_delta", index=index, delta=change)
        if news.finish_reason:
            if block is not None:
                yield say("content_block_stop", index=index)
            yield say("message_delta", delta=_end(news.finish_reason, news.stop), usage=_usage(generation))
    yield say("message_stop")
