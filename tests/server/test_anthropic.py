"""Anthropic's own client against the server."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from llama import Llama
from tests.server.test_openai import CITY
from tests.support.serving import NAME

if TYPE_CHECKING:
    import anthropic

ASK = {
    "model": NAME,
    "max_tokens": 12,
    "system": "Be brief.",
    "messages": [{"role": "user", "content": "a 🦙?"}],
}
DIALOG = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a 🦙?"}]
GREEDY = {"extra_body": {"temperature": 0}}
TOOL = {"name": "weather", "description": "The weather.", "input_schema": CITY}


@pytest.fixture
def client(url: str):
    import anthropic

    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_messages_are_the_librarys(client: anthropic.Anthropic, llama: Llama) -> None:
    (expected,) = llama.chat_completion([DIALOG], temperature=0, max_gen_len=12)
    reply = client.messages.create(**ASK, **GREEDY)
    assert [block.text for block in reply.content] == [expected["generation"]["content"]]
    assert reply.stop_reason == "max_tokens"
    prompt = len(llama.formatter.encode_dialog_prompt(DIALOG))
    assert reply.usage.input_tokens + reply.usage.cache_read_input_tokens == prompt
    assert reply.usage.output_tokens == 12
    blocks = [{"type": "text", "text": "a 🦙?", "cache_control": {"type": "ephemeral"}}]
    again = {
        **ASK,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": blocks}],
    }
    assert client.messages.create(**again, **GREEDY).content == reply.content
    count = {name: ASK[name] for name in ("model", "system", "messages")}
    assert client.messages.count_tokens(**count).input_tokens == prompt


def test_streams_join_to_the_whole(client: anthropic.Anthropic) -> None:
    reply = client.messages.create(**ASK, **GREEDY)
    with client.messages.stream(**ASK, **GREEDY) as events:
        seen = list(events)
        final = events.get_final_message()
    assert final.content[0].text == reply.content[0].text
    assert final.stop_reason == reply.stop_reason
    assert final.usage.output_tokens == reply.usage.output_tokens
    usage = seen[0].message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens > 12
    types = [event.type for event in seen if event.type not in ("text", "content_block_delta")]
    assert types == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_stop_sequences_are_named(client: anthropic.Anthropic) -> None:
    text = client.messages.create(**ASK, **GREEDY).content[0].text
    reply = client.messages.create(**ASK, **GREEDY, stop_sequences=[text[2:4]])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", text[2:4])
    assert "".join(block.text for block in reply.content) == text[: text.find(text[2:4])]


def test_tools_are_used_and_answered(client: anthropic.Anthropic) -> None:
    server_tool = {"type": "web_search_20250305", "name": "web_search"}
    ask = {**ASK, "max_tokens": 200, "tools": [TOOL, server_tool], "tool_choice": {"type": "any"}}
    reply = client.messages.create(**ask)
    (call,) = reply.content
    assert (call.type, call.name, reply.stop_reason) == ("tool_use", "weather", "tool_use")
    assert call.input["city"] in ("Oslo", "Rome")
    with client.messages.stream(**{**ask, "tool_choice": {"type": "tool", "name": "weather"}}) as events:
        assert events.get_final_message().content[0].input["days"] <= 9
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "12°C"}]}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": [block.model_dump() for block in reply.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "And so?"}]},
    ]
    answer = client.messages.create(**{**ASK, "messages": messages, "tools": [TOOL], "max_tokens": 3})
    assert sum(answer.usage.model_dump(include={"input_tokens", "cache_read_input_tokens"}).values()) > 1000


def test_a_schema_is_kept(client: anthropic.Anthropic) -> None:
    shape = {"format": {"type": "json_schema", "schema": CITY}}
    reply = client.messages.create(**{**ASK, "max_tokens": 200}, output_config=shape)
    assert json.loads(reply.content[0].text)["city"] in ("Oslo", "Rome")


def test_mistakes_are_typed_errors(client: anthropic.Anthropic) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError, match="'other' does not exist"):
        client.messages.create(**{**ASK, "model": "other"})
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**ASK, extra_body={"temperature": 7})
    picture = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/a.png"}}
    with pytest.raises(anthropic.BadRequestError, match="an image needs a source of type base64") as caught:
        client.messages.create(**{**ASK, "messages": [{"role": "user", "content": [picture]}]})
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert [model.id for model in client.models.list()] == [NAME]


def test_asynchronously(url: str, client: anthropic.Anthropic) -> None:
    import anthropic

    expected = client.messages.create(**ASK, **GREEDY).content[0].text

    async def ask() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:

            async def whole() -> str:
                return (await client.messages.create(**ASK, **GREEDY)).content[0].text

            async def streamed() -> str:
                async with client.messages.stream(**ASK, **GREEDY) as events:
                    return "".join([text async for text in events.text_stream])

            return list(await asyncio.gather(whole(), streamed(), whole(), streamed()))

    assert asyncio.run(ask()) == [expected] * 4
