"""OpenAI's own client against the server: every answer is the library's."""

import asyncio
import json
import re

import openai
import pytest

from llama import Llama
from tests.support.serving import NAME

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a 🦙?"}]
DRAWN = {"temperature": 1.2, "top_p": 1.0, "seed": 5, "max_tokens": 24}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"name": "weather", "description": "The weather.", "parameters": CITY}


@pytest.fixture
def client(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def create(client: openai.OpenAI):
    def create(messages=MESSAGES, **options):
        return client.chat.completions.create(model=NAME, messages=messages, **options)

    return create


def test_chats_are_the_librarys(create, llama: Llama) -> None:
    expected = llama.chat_completion([MESSAGES], n=3, logprobs=True, top_logprobs=2, **DRAWN)
    reply = create(n=3, logprobs=True, top_logprobs=2, **DRAWN)
    assert [choice.message.content for choice in reply.choices] == [
        e["generation"]["content"] for e in expected
    ]
    assert [choice.finish_reason for choice in reply.choices] == [e["finish_reason"] for e in expected]
    for choice, e in zip(reply.choices, expected, strict=True):
        assert [token.logprob for token in choice.logprobs.content] == pytest.approx(e["logprobs"], abs=1e-5)
        assert b"".join(bytes(t.bytes) for t in choice.logprobs.content).decode(errors="replace") == (
            choice.message.content
        )
        assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * len(e["tokens"])
    prompt = len(llama.formatter.encode_dialog_prompt(MESSAGES))
    assert reply.usage.prompt_tokens == prompt
    assert reply.usage.completion_tokens == sum(len(e["tokens"]) for e in expected)
    assert 0 <= reply.usage.prompt_tokens_details.cached_tokens < prompt
    assert create(**DRAWN).usage.prompt_tokens_details.cached_tokens == prompt - 1


def test_streamed_chats_join_to_the_whole(create) -> None:
    whole = create(n=2, logprobs=True, **DRAWN)
    chunks = list(create(n=2, logprobs=True, stream=True, **DRAWN))
    for index, choice in enumerate(whole.choices):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        scored = [token.logprob for c in mine if c.logprobs for token in c.logprobs.content]
        assert scored == pytest.approx([token.logprob for token in choice.logprobs.content], abs=1e-5)
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_last_and_only_when_asked_for(create) -> None:
    *chunks, last = create(stream=True, stream_options={"include_usage": True}, **DRAWN)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == create(**DRAWN).usage.completion_tokens


def test_content_may_be_parts(create) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "🦙?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert create(messages, **DRAWN).choices[0].message.content == create(**DRAWN).choices[0].message.content
    picture = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]
    with pytest.raises(openai.BadRequestError, match="must be a data URL"):
        create([{"role": "user", "content": picture}])


def test_stop_limits_and_options(create, llama: Llama) -> None:
    text = create(**DRAWN).choices[0].message.content
    stopped = create(stop=[text[4:6]], **DRAWN).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.find(text[4:6])], "stop")
    limited = create(**{**DRAWN, "max_tokens": None}, max_completion_tokens=3)
    assert (limited.usage.completion_tokens, limited.choices[0].finish_reason) == (3, "length")
    bias = {str(ord("x")): 100}
    assert create(logit_bias=bias, max_tokens=4, temperature=0).choices[0].message.content == "xxxx"
    extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3}
    (expected,) = llama.chat_completion([MESSAGES], **DRAWN, **extra, presence_penalty=0.5)
    reply = create(extra_body=extra, presence_penalty=0.5, **DRAWN)
    assert reply.choices[0].message.content == expected["generation"]["content"]


def test_a_schema_is_kept(create) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": CITY, "strict": True}}
    for stream in (False, True):
        reply = create(response_format=form, max_tokens=200, stream=stream)
        chunks = reply if stream else []
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        value = json.loads(text or reply.choices[0].message.content)
        assert value["city"] in ("Oslo", "Rome")
        assert value["days"] <= 9
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        create(response_format={"type": "json_schema"})


def test_tools_are_called_and_answered(create) -> None:
    tools = [{"type": "function", "function": TOOL}, {"type": "web_search"}]
    options = {"tools": tools, "tool_choice": "required", "max_tokens": 200, "seed": 1}
    choice = create(**options).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    deltas = [c.delta for chunk in create(stream=True, **options) for c in chunk.choices]
    parts = [part for delta in deltas for part in delta.tool_calls or ()]
    assert parts[0].id
    assert [part.function.name for part in parts if part.function.name] == ["weather"]
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    result = {"role": "tool", "content": "12°C", "tool_call_id": call.id}
    answer = create(
        [*MESSAGES, choice.message, result], tools=tools[:1], max_tokens=4, logit_bias={"120": 100}
    )
    assert answer.choices[0].message.content == "xxxx"
    with pytest.raises(openai.BadRequestError, match="does not name one of the tools"):
        create(tools=tools, tool_choice={"type": "function", "function": {"name": "other"}})
    assert create(tools=tools[1:], tool_choice="auto", max_tokens=2).choices[0].message.tool_calls is None


@pytest.mark.parametrize("prompt", ["the", ["the", "b 🦙"], [1, 2, 3], [[1, 2], [3]]], ids=str)
def test_completions_are_the_librarys(client: openai.OpenAI, llama: Llama, prompt) -> None:
    reply = client.completions.create(model=NAME, prompt=prompt, n=2, **DRAWN)
    if isinstance(prompt, str) or isinstance(prompt[0], str):
        texts = [prompt] if isinstance(prompt, str) else prompt
        ids = [llama.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    else:
        ids = [prompt] if isinstance(prompt[0], int) else prompt
    tokens, _ = llama.generate(ids, n=2, **DRAWN)
    assert [choice.text for choice in reply.choices] == [llama.tokenizer.decode(t) for t in tokens]
    assert [choice.index for choice in reply.choices] == list(range(len(tokens)))
    assert reply.usage.prompt_tokens == sum(map(len, ids))
    assert reply.usage.completion_tokens == sum(map(len, tokens))
    chunks = list(client.completions.create(model=NAME, prompt=prompt, n=2, stream=True, **DRAWN))
    for choice in reply.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason


def test_scoring_a_prompt(client: openai.OpenAI, llama: Llama) -> None:
    """As programs that compare likelihoods ask for it: they drop the last token, so there must be one."""
    ids = llama.tokenizer.encode("the llama", bos=True, eos=False)
    options = {"model": NAME, "prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    for stop in (False, True):
        bias = {"logit_bias": {str(llama.tokenizer.stop_tokens[0]): 100}} if stop else {}
        choice = client.completions.create(**options, **bias).choices[0]
        _, (expected,) = llama.generate([ids], 0, logprobs=True, echo=True)
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(expected[1:], abs=1e-5)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(ids) + 1
        assert choice.text.startswith("".join(choice.logprobs.tokens[:-1]))
    chunks = list(client.completions.create(**options, stream=True))
    streamed = [
        p for chunk in chunks for p in (c.logprobs.token_logprobs[0] for c in chunk.choices if c.logprobs)
    ]
    assert streamed[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-5)
    zero = client.completions.create(model=NAME, prompt=ids, echo=True, max_tokens=0).choices[0]
    assert zero.text == llama.tokenizer.decode(ids)


def test_responses(client: openai.OpenAI, llama: Llama) -> None:
    options = {"model": NAME, "temperature": 0, "max_output_tokens": 12}
    given = {"instructions": "Be brief.", "input": "a 🦙?"}
    (expected,) = llama.chat_completion([MESSAGES], temperature=0, max_gen_len=12)
    reply = client.responses.create(**given, **options)
    assert reply.output_text == expected["generation"]["content"]
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.usage.output_tokens == 12
    assert reply.usage.input_tokens == len(llama.formatter.encode_dialog_prompt(MESSAGES))
    items = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "a 🦙?"}]
    assert client.responses.create(input=items, **options).output_text == reply.output_text
    with client.responses.stream(**given, **options) as events:
        seen = list(events)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(e.delta for e in seen if e.type == "response.output_text.delta") == reply.output_text
    assert seen[-1].type == "response.incomplete"
    with pytest.raises(openai.BadRequestError, match="not stored"):
        client.responses.create(previous_response_id=reply.id, **given, **options)


@pytest.mark.slow
def test_responses_call_functions(client: openai.OpenAI) -> None:
    options = {"model": NAME, "tools": [{"type": "function", **TOOL}], "max_output_tokens": 200}
    reply = client.responses.create(input="Weather?", tool_choice="required", **options)
    (call,) = reply.output
    assert (call.type, call.name, reply.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["days"] <= 9
    with client.responses.stream(input="Weather?", tool_choice="required", **options) as events:
        streamed = events.get_final_response().output[0] if list(events) else None
    assert json.loads(streamed.arguments)["days"] <= 9
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "12°C"}
    conversation = [{"role": "user", "content": "Weather?"}, call.model_dump(exclude_none=True), output]
    answer = client.responses.create(input=conversation, **{**options, "max_output_tokens": 4})
    assert answer.usage.input_tokens > reply.usage.input_tokens
    shape = {"format": {"type": "json_schema", "name": "trip", "schema": CITY, "strict": True}}
    shaped = client.responses.create(model=NAME, input="Where?", text=shape)
    assert json.loads(shaped.output_text)["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("shape", [{"regex": "(llama|alpaca){2}"}, {"grammar": 'start: ("a" | "b")~4'}])
def test_regex_and_grammar(client: openai.OpenAI, create, llama: Llama, shape: dict) -> None:
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 40}
    (expected,) = llama.chat_completion([MESSAGES], **options, **shape)
    assert create(**options, extra_body=shape).choices[0].message.content == expected["generation"]["content"]
    (expected,) = llama.text_completion(["the"], **options, **shape)
    found = client.completions.create(model=NAME, prompt="the", **options, extra_body=shape)
    assert found.choices[0].text == expected["generation"]
    assert re.fullmatch("(llama|alpaca){2}|[ab]{4}", found.choices[0].text)


def test_completions_keep_a_schema(client: openai.OpenAI) -> None:
    shape = {"response_format": {"type": "json_schema", "json_schema": {"name": "trip", "schema": CITY}}}
    found = client.completions.create(model=NAME, prompt="the", max_tokens=200, extra_body=shape)
    assert json.loads(found.choices[0].text)["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"temperature": "1"}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "bot", "content": ""}]}, openai.BadRequestError, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5000 * "x"}]}, openai.BadRequestError, "max_seq_len=4096"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "unknown field 'temprature'"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, openai.BadRequestError, "logit_bias names 9999"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs=2 needs logprobs"),
        ({"extra_body": {"regex": "("}}, openai.BadRequestError, "this regex cannot constrain"),
        ({"extra_body": {"grammar": "start: x"}}, openai.BadRequestError, "this grammar cannot constrain"),
        ({"extra_body": {"regex": "a", "grammar": "start: 'a'"}}, openai.BadRequestError, "pass only one"),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
        ({"model": "other"}, openai.NotFoundError, "'other' does not exist here; this server has 'tiny'"),
    ],
    ids=str,
)
def test_mistakes_are_typed_errors(client: openai.OpenAI, options: dict, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        client.chat.completions.create(**{"model": NAME, "messages": MESSAGES, **options})


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


@pytest.mark.slow
def test_many_at_once_get_what_each_gets_alone(url: str, llama: Llama) -> None:
    dialogs = [[{"role": "user", "content": f"{i} " * (i % 7 + 1)}] for i in range(24)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def one(i: int) -> str:
                options = {"model": NAME, "messages": dialogs[i], **DRAWN, "seed": i}
                if i % 2:
                    return (await client.chat.completions.create(**options)).choices[0].message.content
                chunks = await client.chat.completions.create(**options, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in chunks])

            return list(await asyncio.gather(*map(one, range(len(dialogs)))))

    answers = asyncio.run(ask())
    alone = [llama.chat_completion([d], **{**DRAWN, "seed": i})[0] for i, d in enumerate(dialogs)]
    assert answers == [answer["generation"]["content"] for answer in alone]
