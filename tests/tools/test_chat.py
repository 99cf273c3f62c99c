"""Tools in chats: prompts, calls, results, streams, and the loop."""

import json

import pytest

from llama.errors import ArgumentError
from tests.support.script import scripted

WEATHER = {
    "name": "get_weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
DIALOG = [{"role": "user", "content": "How is the weather in Ulm?"}]
CALL = 'Let me see. {"name": "get_weather", "parameters": {"city": "Ulm"}}'
TWO = '[get_weather(city="Ulm"), get_weather(city="Bonn")]'
GREEDY = {"temperature": 0, "tool_format": "json"}


@pytest.fixture(scope="module")
def llama():
    return scripted(CALL, "It rains in Ulm, as always.")


def test_calls_come_as_a_message_that_can_be_sent_back(llama):
    (answer,) = llama.chat_completion([DIALOG], tools=[WEATHER], **GREEDY)
    assert answer["finish_reason"] == "tool_calls"
    function = {"name": "get_weather", "arguments": '{"city": "Ulm"}'}
    assert answer["generation"] == {
        "role": "assistant",
        "content": "Let me see. ",
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": "call_0", "content": "rain"}
    (answer,) = llama.chat_completion([[*DIALOG, answer["generation"], result]], tools=[WEATHER], **GREEDY)
    assert answer["finish_reason"] == "stop"
    assert answer["generation"] == {"role": "assistant", "content": "It rains in Ulm, as always."}


def test_a_stream_joined_is_the_answer(llama):
    text, arguments, names = "", "", []
    for event in llama.stream_chat([DIALOG], tools=[WEATHER], **GREEDY):
        text += event.text
        for delta in event.tool_calls:
            names += [delta.name] if delta.name else []
            arguments += delta.arguments
    assert (text, names, arguments) == ("Let me see. ", ["get_weather"], '{"city": "Ulm"}')
    assert event.finish_reason == "tool_calls"


def test_without_tools_or_with_choice_none_a_call_is_text(llama):
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}):
        (answer,) = llama.chat_completion([DIALOG], **options, **GREEDY)
        assert answer["generation"] == {"role": "assistant", "content": CALL}
        assert answer["finish_reason"] == "stop"


def test_a_call_that_is_cut_off_says_so(llama):
    (answer,) = llama.chat_completion([DIALOG], tools=[WEATHER], max_gen_len=28, **GREEDY)
    assert answer["finish_reason"] == "length"
    assert answer["generation"]["tool_calls"][0]["function"]["arguments"] in '{"city": "Ulm"}'


def test_one_call_only():
    llama = scripted(TWO)
    options = {"tools": [WEATHER], "temperature": 0, "tool_format": "pythonic"}
    (both,) = llama.chat_completion([DIALOG], **options)
    assert [c["function"]["arguments"] for c in both["generation"]["tool_calls"]] == [
        '{"city": "Ulm"}',
        '{"city": "Bonn"}',
    ]
    (one,) = llama.chat_completion([DIALOG], parallel_tool_calls=False, **options)
    assert one["generation"]["tool_calls"] == both["generation"]["tool_calls"][:1]
    assert one["finish_reason"] == "tool_calls"
    ends = list(llama.stream_chat([DIALOG], parallel_tool_calls=False, **options))
    assert ends[-1].stats.new_tokens < len(list(llama.stream_chat([DIALOG], **options))) - 1


def test_run_tools_calls_functions_until_there_is_an_answer(llama):
    asked = []

    def get_weather(city: str) -> dict:
        """Tell the weather."""
        asked.append(city)
        return {"sky": "grey"}

    messages = llama.run_tools(DIALOG, [get_weather], **GREEDY)
    assert asked == ["Ulm"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2] == {"role": "tool", "tool_call_id": "call_0", "content": '{"sky": "grey"}'}
    assert messages[3]["content"] == "It rains in Ulm, as always."


def test_run_tools_tells_the_model_of_wrong_arguments_and_raises_what_a_function_raises(llama):
    def get_weather(city: int) -> str:
        raise KeyError(city)

    messages = llama.run_tools(DIALOG, [get_weather], **GREEDY)
    assert messages[2]["content"].startswith(
        "error: these arguments do not fit get_weather: city: Input should"
    )

    def get_weather(city: str) -> str:
        raise KeyError(city)

    with pytest.raises(KeyError):
        llama.run_tools(DIALOG, [get_weather], **GREEDY)


def test_run_tools_ends_after_so_many_turns():
    def get_weather(city: str) -> str:
        return "rain"

    messages = scripted(CALL, CALL + " ").run_tools(DIALOG, [get_weather], max_turns=2, **GREEDY)
    assert [message["role"] for message in messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert messages[-1]["content"] == CALL + " "
    ids = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    assert ids == ["call_0", "call_1"]


def test_a_models_code_goes_to_the_callers_own_sandbox():
    llama = scripted("<|python_tag|>print(6 * 7)", "The answer is 42.")
    ran = []
    messages = llama.run_tools(
        DIALOG, [], builtin_tools={"code_interpreter": lambda code: ran.append(code) or "42"}, **GREEDY
    )
    assert ran == ["print(6 * 7)"]
    assert messages[-1]["content"] == "The answer is 42."
    with pytest.raises(ArgumentError, match="'get_weather' is only a description"):
        llama.run_tools(DIALOG, [WEATHER], **GREEDY)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"tool_format": None},
            "this checkpoint was not trained to call tools; .* tool_format=, one of json",
        ),
        ({"tool_format": "xml"}, "unknown tool_format 'xml'"),
        ({"tool_choice": "always"}, 'tool_choice must be "auto", "none", "required" or'),
        ({"tool_choice": {"name": "other"}}, "does not name one of the tools"),
        ({"tools": [], "tool_choice": "required"}, "needs tools"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls must be True or False"),
        ({"tool_choice": "required", "regex": "a"}, "cannot be combined with schema"),
        ({"tool": [WEATHER]}, r"unknown argument 'tool'"),
    ],
)
def test_options_that_do_not_fit_are_refused(llama, options, says):
    with pytest.raises(ArgumentError, match=says):
        llama.chat_completion([DIALOG], **{"tools": [WEATHER], **GREEDY, **options})


@pytest.mark.parametrize(
    "choice", ["required", {"name": "pay"}, {"type": "function", "function": {"name": "pay"}}]
)
def test_a_required_tool_is_called_whatever_the_model_would_say(llama, choice):
    pay = {
        "name": "pay",
        "parameters": {
            "type": "object",
            "properties": {
                "euros": {"type": "integer", "minimum": 1, "maximum": 99},
                "to": {"$ref": "#/$defs/Name"},
            },
            "required": ["euros", "to"],
            "$defs": {"Name": {"enum": ["Ann", "Bob"]}},
        },
    }
    for seed in range(5):
        (answer,) = llama.chat_completion(
            [DIALOG], tools=[WEATHER, pay] if choice != "required" else [pay], tool_choice=choice,
            tool_format="json", temperature=2.0, top_p=1.0, seed=seed,
        )  # fmt: skip
        assert answer["finish_reason"] == "tool_calls"
        (call,) = answer["generation"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] == "pay"
        assert 1 <= arguments["euros"] <= 99 and arguments["to"] in ("Ann", "Bob")
