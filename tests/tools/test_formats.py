"""Prompts with tools, against what Meta's packages render."""

import hashlib
import json
import random
from datetime import date
from pathlib import Path

import pytest

from llama.errors import ArgumentError
from llama.tokenizer import Tokenizer
from llama.tools.definitions import parse_tools
from llama.tools.formats import FORMATS, tool_format, tool_response
from llama.tools.parser import parse_answer
from llama.tools.render import encode_turns, render, system_3_1
from tests.tools import cases

DATA = Path(__file__).parents[1] / "data" / "prompts"
GOLDENS = json.loads((DATA / "tool-goldens.json").read_text("utf-8"))
TODAY = date(2024, 9, 21)
SONGS = {
    "name": "trending_songs",
    "description": "Returns the trending songs on a Music site",
    "parameters": {
        "type": "object",
        "properties": {
            "n": {"type": "int", "description": "The number of songs to return"},
            "genre": {"type": "str", "description": "The genre of the songs to return"},
        },
        "required": ["n"],
    },
}


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer: Tokenizer) -> Tokenizer:
    return llama3_tokenizer


def test_text_of_random_tools_equals_that_of_metas_generators():
    expected = json.loads((DATA / "generators.json").read_text())
    for name, hashes in expected.items():
        for seed, digest in enumerate(hashes):
            text = FORMATS[name].fill(parse_tools(cases.tools(seed)))
            assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest, (name, seed, text)


INTERFACE = GOLDENS['meta-0.1.2 LLama31Interface (user message "Hi")']


@pytest.mark.parametrize("name", [name for name in INTERFACE if "none" not in name])  # which has no tools
def test_dialogs_equal_those_of_metas_interface(name: str, tokenizer: Tokenizer):
    form, case = name.split("/")
    builtin = ["brave_search", "wolfram_alpha", "code_interpreter"]
    tools = {"builtin": builtin, "code_only": ["code_interpreter"], "custom": [SONGS]}.get(case, [])
    if case == "builtin+custom":
        tools = [*builtin, SONGS]
    dialog = [{"role": "user", "content": "Hi"}]
    if case != "code_only":
        dialog.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    ids = encode_turns(render(dialog, parse_tools(tools), tool_format(form), TODAY), tokenizer)
    assert tokenizer.decode(ids) == INTERFACE[name].replace("{today:%d %B %Y}", "21 September 2024")


@pytest.mark.parametrize("form", ["json", "function_tag", "pythonic"])
def test_calls_and_results_equal_those_of_metas_chat_format(form: str, tokenizer: Tokenizer):
    # An argument with a quote, and one that is an object, Meta's Python lists do not escape.
    arguments = {"a": "x", "b": True, "c": [1, "z"], "e": None}
    expected = GOLDENS["meta-0.3.0 ChatFormat.encode_dialog_prompt"][
        {"pythonic": "python_list"}.get(form, form)
    ]
    expected = expected.replace('x\\"y', "x").replace('x"y', "x")
    expected = expected.replace(', "d": {"k": "v"}', "").replace(', d={k="v"}', "")
    call = {"id": "1", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    dialog = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"r": 1}'},
    ]
    ids = encode_turns(render(dialog, [], tool_format(form), TODAY), tokenizer)
    assert tokenizer.decode(ids) == expected


def test_ids_equal_those_of_metas_chat_format(tokenizer: Tokenizer):
    from llama_models.datatypes import RawMessage, StopReason, ToolCall
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    code = 'print("a<|eot_id|>")\n'
    call = ToolCall(call_id="1", tool_name="code_interpreter", arguments={"code": code})
    theirs = ChatFormat(MetaTokenizer.get_instance()).encode_dialog_prompt(
        [
            RawMessage(role="system", content=system_3_1(["code_interpreter"], "", TODAY)),
            RawMessage(role="user", content="Q"),
            RawMessage(
                role="assistant", content="", tool_calls=[call], stop_reason=StopReason.end_of_message
            ),
            RawMessage(role="tool", call_id="1", content=tool_response(True, "a")),
        ]
    )
    calls = [{"function": {"name": "code_interpreter", "arguments": {"code": code}}}]
    dialog = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "completed\n[stdout]a[/stdout]"},
    ]
    turns = render(dialog, parse_tools(["code_interpreter"]), tool_format("json"), TODAY)
    assert encode_turns(turns, tokenizer) == theirs.tokens


@pytest.mark.parametrize("case", GOLDENS["meta-0.1.2 ToolResponseGenerator"])
def test_tool_responses_equal_metas(case: dict):
    arguments = {**case["args"]}
    ok = arguments.pop("status") == "success"
    assert tool_response(ok, **arguments) == case["out"]


@pytest.mark.parametrize("form", FORMATS)
def test_calls_in_every_form_are_read_back(form: str):
    rng = random.Random(1)
    for _ in range(100):
        calls = cases.calls(rng, ["f", "get-weather"], 3)
        text = FORMATS[form].write(calls)
        answer = parse_answer(text, ["f", "get-weather"])
        assert answer.content == ""
        assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == calls, text


def calls_and_results(ids: list[str], results: list[str]) -> list[dict]:
    calls = [{"id": i, "function": {"name": "f", "arguments": {"n": i}}} for i in ids]
    return [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": i, "content": f"result {i}"} for i in results),
    ]


def test_results_are_given_back_in_the_order_of_the_calls():
    dialog = calls_and_results(["1", "2"], ["2", "1"])
    turns = render(dialog, [], tool_format("pythonic"), TODAY)
    assert [turn.text for turn in turns[1:]] == ['[f(n="1"), f(n="2")]', "result 1", "result 2"]
    # A form with one call at a time has each result behind its call.
    turns = render(dialog, [], tool_format("json"), TODAY)
    assert [turn.role for turn in turns[1:]] == ["assistant", "ipython"] * 2
    assert turns[2].text == "result 1" and turns[4].text == "result 2"


@pytest.mark.parametrize(
    ("dialog", "says"),
    [
        (calls_and_results(["1"], ["3"]), "answers call '3'"),
        (calls_and_results(["1"], ["1", "1"]), "2 tool messages follow a message with 1 tool calls"),
        ([{"role": "assistant", "content": "", "tool_calls": ["f"]}], "a tool call must look like"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "arguments of a call to f are not JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "must be an object",
        ),
    ],
)
def test_calls_and_results_that_do_not_fit_are_refused(dialog: list, says: str):
    with pytest.raises(ArgumentError, match=says):
        render(dialog, [], tool_format("json"), TODAY)


def test_tools_need_a_question_and_a_form_that_has_them():
    with pytest.raises(ArgumentError, match="need a user message"):
        render([{"role": "system", "content": "S"}], parse_tools([SONGS]), tool_format("json"), TODAY)
    with pytest.raises(ArgumentError, match="does not support built-in tools"):
        render([], parse_tools(["brave_search"]), tool_format("pythonic"), TODAY)
    with pytest.raises(ArgumentError, match="unknown tool_format 'xml'; use one of json, function_tag"):
        tool_format("xml")


def test_texts_of_a_caller_fill_slots_and_never_make_new_ones():
    tool = {"name": "f", "description": "{question} {tools}"}
    text = tool_format("pythonic_user").fill(parse_tools([tool]), "{tools}?")
    assert text.startswith("Questions: {tools}?\n") and text.count('"description": "{question} {tools}"') == 1
