"""Tool calls in what models write, whole and piece by piece."""

import json
import random

import pytest

from llama.tokenizer import Tokenizer
from llama.tokenizer.text_stream import TextStream
from llama.tools.formats import FORMATS
from llama.tools.parser import Delta, ParsedAnswer, ToolParser, parse_answer
from tests.tools import cases

TOOLS = ["f", "g", "get-weather", "a.b", "brave_search"]


def stream(text: str, step: int, tools: list[str] = TOOLS) -> tuple[ParsedAnswer, list[Delta]]:
    parser, answer, deltas = ToolParser(tools), ParsedAnswer(), []
    for at in range(0, len(text), step):
        deltas += parser.push(text[at : at + step])
    deltas += parser.finish()
    for delta in deltas:
        answer.add(delta)
    return answer, deltas


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"type":"function","name":"f","parameters":{"a":{"b":1}}}', "", [("f", {"a": {"b": 1}})]),
        ('{"name": "f", "arguments": {}}', "", [("f", {})]),
        ('{"parameters": {"x": 1}, "type": "function", "name": "f"}', "", [("f", {"x": 1})]),
        ('{"name":"f","parameters":"{\\"a\\": 1}"}', "", [("f", {"a": 1})]),
        ('{"name": "f", "parameters": null}', "", [("f", {})]),
        ('<|python_tag|>{"name":"f","parameters":{"a":1}}', "", [("f", {"a": 1})]),
        ('{"name":"f"}; {"name":"g","parameters":{"q":["]", {"z":";"}]}}\n{"name":"f","arguments":{}}', "",
         [("f", {}), ("g", {"q": ["]", {"z": ";"}]}), ("f", {})]),
        ('[{"name":"f","parameters":{"a":-1}}, {"name":"g","parameters":{}}]', "",
         [("f", {"a": -1}), ("g", {})]),
        ('Sure: {"name":"f","parameters":{"a":"it\'s; } \\" "}} bye', "Sure:  bye",
         [("f", {"a": "it's; } \" "})]),
        ('<function=f>{"a": {"b": 1}, "c": "it\'s"}"</function>', "", [("f", {"a": {"b": 1}, "c": "it's"})]),
        ('<function=f></function> <function=g>{"a":true}', "", [("f", {}), ("g", {"a": True})]),
        ("[f(a=1,b='x'), g()]", "", [("f", {"a": 1, "b": "x"}), ("g", {})]),
        ("<|python_tag|>[f(a=1)]", "", [("f", {"a": 1})]),
        ('[get-weather(n=-3, t=true, l=[1,{"a":None}], e=\'it\\\'s\', d=("x",))]', "",
         [("get-weather", {"n": -3, "t": True, "l": [1, {"a": None}], "e": "it's", "d": ["x"]})]),
        ('[a.b(x=some+name, y="""q"x""", z=\'\')]', "", [("a.b", {"x": "some+name", "y": 'q"x', "z": ""})]),
        ('<|python_tag|>get-weather(location="x")', "", [("get-weather", {"location": "x"})]),
        ('<|python_tag|>brave_search.call(query="a, b")', "", [("brave_search", {"query": "a, b"})]),
        ('brave_search.call(query="x")', "", [("brave_search", {"query": "x"})]),
        ('<|python_start|>[f(a="x")]<|python_end|>', "", [("f", {"a": "x"})]),
        ('<|python_start|>Well<|python_end|>{"name": "f", "parameters": {}}', "Well", [("f", {})]),
        ("[f(a=1), h(b=2)]", ", h(b=2)]", [("f", {"a": 1})]),
        ("[f(a=1) g]", " g]", [("f", {"a": 1})]),
        ("<|python_tag|>print(1)", "print(1)", []),
    ],
)  # fmt: skip
def test_forms(text: str, content: str, calls: list):
    answer = parse_answer(text, TOOLS)
    assert answer.content == content
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == calls
    for step in (1, 2, 3, 7):
        assert stream(text, step)[0] == answer


@pytest.mark.parametrize(
    "text",
    [
        "", " \n", "Hello.", "f(a=1)", "[1, 2, 3]", '{"a": 2}', "a < b, [see h(a=1)] <b>",
        '{"name": "f", "age": 3}',
        '{"name": "Bob", "parameters": {}}', '[f("positional")]', "[f]", '{"name":"f","parameters":[1]}',
        '<function=unknown>{"a": 1}</function>', '<function=f>not JSON</function>',
        '{"name": "f", "para', "[get-wea",
    ],
)  # fmt: skip
def test_what_is_no_call_of_a_known_tool_is_text(text: str):
    assert parse_answer(text, TOOLS) == ParsedAnswer(text)
    for step in (1, 2, 3):
        assert stream(text, step)[0] == ParsedAnswer(text)


def test_code_after_the_tag_is_a_call_of_the_interpreter_if_there_is_one():
    text = '<|python_tag|>x = {"a": 1}\nif 1 < 2:\n    print("[ü]")\n'
    answer, deltas = stream(text, 3, ["code_interpreter"])
    assert json.loads(answer.calls[0].arguments) == {"code": text.removeprefix("<|python_tag|>")}
    assert len(deltas) > 10
    assert parse_answer("no tag: print(1)", ["code_interpreter"]).calls == []


def test_a_name_comes_when_complete_and_then_arguments_piece_by_piece():
    parser = ToolParser(TOOLS)
    pieces = ['{"na', 'me": "f", "parameters": ', '{"te', 'xt": "lon', 'g"', "}", "}", " \n"]
    seen = [parser.push(piece) for piece in pieces]
    assert seen[:2] == [[], []]
    assert seen[2] == [Delta(call=0, id="call_0", name="f"), Delta(call=0, arguments='{"te')]
    assert [d.arguments for deltas in seen[3:] for d in deltas] == ['xt": "lon', 'g"', "}"]
    assert parser.closed == 1 and parser.finish() == []


def test_text_is_not_held_back_longer_than_needed():
    parser = ToolParser(TOOLS)
    assert "".join(d.content for d in parser.push('Look: {"answer": {"name')) == 'Look: {"answer": '


@pytest.mark.parametrize("seed", range(20))
def test_random_answers_cut_anywhere_are_read_back(seed: int):
    rng = random.Random(seed)
    for _ in range(25):
        calls = cases.calls(rng, TOOLS[:4], 3)
        form = FORMATS[rng.choice(list(FORMATS))]
        before, after = rng.choice(["", "I see: ", "<|python_tag|>", "\n"]), rng.choice(["", " Done.", "\n"])
        between = rng.choice(["; ", "\n", ""])
        text = before + between.join(form.write([call]) for call in calls) + after
        whole = parse_answer(text, TOOLS)
        assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == calls, text
        assert whole.content.strip() == (before + after).replace("<|python_tag|>", "").strip()
        parser, answer, at = ToolParser(TOOLS), ParsedAnswer(), 0
        while at < len(text):
            size = rng.randint(1, 8)
            for delta in parser.push(text[at : at + size]):
                answer.add(delta)
            at += size
        for delta in parser.finish():
            answer.add(delta)
        assert answer == whole


def test_random_answers_cut_at_every_token_are_read_back(llama3_tokenizer: Tokenizer):
    rng = random.Random(0)
    for _ in range(100):
        calls = cases.calls(rng, TOOLS[:4], 3)
        form = FORMATS[rng.choice(list(FORMATS))]
        text = "; ".join(form.write([call]) for call in calls)
        ids = llama3_tokenizer.encode(text, bos=False, eos=False)
        parser, answer, pieces = ToolParser(TOOLS), ParsedAnswer(), TextStream(llama3_tokenizer)
        for piece in [*map(pieces.push, ids), pieces.flush()]:
            for delta in parser.push(piece):
                answer.add(delta)
        for delta in parser.finish():
            answer.add(delta)
        assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == calls, text
        assert answer == parse_answer(text, TOOLS)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_read_without_an_error_and_the_same_however_it_is_cut(seed: int):
    rng = random.Random(seed)
    words = '{"name": "f"|, "parameters": {|}|]|[|f(|a=|<function=f>|</function>|brave_search.call('
    parts = [*words.split("|"), "<|python_tag|>", "<|python_end|>", *"'\"\\),1 x:;\n{"]
    for _ in range(200):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 25)))
        tools = rng.choice([TOOLS, [*TOOLS, "code_interpreter"]])
        assert stream(text, rng.randint(1, 4), tools)[0] == parse_answer(text, tools), text


@pytest.mark.parametrize(
    "piece",
    ['{"parameters":', '{"type":', '{"a":', "{", "[", "<", "[f(a=[", "[f(a=-", '<function=f>{"a":', '{"'],
)
def test_hostile_answers_cost_no_more_than_their_length(piece: str):
    class Counting(ToolParser):
        looks = 0

        def peek(self):
            self.looks += 1
            return super().peek()

    text = piece * 2000
    parser = Counting(TOOLS)
    parser.push(text)
    parser.finish()
    assert parser.looks < 10 * len(text)
