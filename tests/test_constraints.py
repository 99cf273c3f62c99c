"""Answers in a shape, from a model that would write noise."""

import json
import math
import random
import re
from typing import Any

import jsonschema
import pydantic
import pytest

from llama import Llama
from llama.errors import ArgumentError
from llama.predictions import collect
from llama.streaming import stream
from llama.tokenizer import SentencePieceTokenizer
from llama.tokenizer.huggingface import HFTokenizer
from tests.support import formats
from tests.support.tiny import byte_tokenizer, small_model

FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"]
# One for each keyword, and for each format.
SCHEMAS: list[Any] = [
    True,
    {},
    *({"type": kind} for kind in ("null", "boolean", "integer", "number", "string", "array", "object")),
    {"type": ["integer", "null"]},
    {"enum": [1, "a", None, [2.5], {"k": False}]},
    {"const": {"a": [1, "é"]}},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 8},
    {"type": "number", "minimum": 0.5, "exclusiveMaximum": 1},
    {"type": "integer", "multipleOf": 7},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[a-f]{2}-[0-9]+$"},
    *({"type": "string", "format": name} for name in FORMATS),
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}, "required": ["b"]},
    {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "null"}}, "additionalProperties": False},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    {"oneOf": [{"type": "boolean"}, {"type": "integer"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"$defs": {"n": {"type": "null"}}, "type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 3},
    {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "$ref": "#/$defs/tree",
    },
    {"type": "object", "title": "A", "description": "d", "default": {}, "examples": [{}], "$comment": "c"},
]  # fmt: skip


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kind = rng.choice(
        ["enum", "integer", "string", "boolean", "any", "array", "object", "object"][: 8 if depth else 4]
    )
    if kind == "enum":
        return {"enum": rng.sample([None, True, 3, -1.5, "a", 'it\'s "b"', [], {"k": 1}], rng.randint(1, 4))}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == "string":
        least = rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 9)}
    if kind == "any":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind == "array":
        least = rng.randint(0, 2)
        items = random_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if kind == "object":
        names = rng.sample(["name", "the", "ü", "a b", "x-y", 'q"', "🦙"], rng.randint(0, 4))
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.6]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    return {"type": kind}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = (" the", "name", '": ', '", "', "true", "null", "ü", "🦙")
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), words=words)


@pytest.fixture(scope="module", params=[False, True], ids=["ragged", "static"])
def llama(request, tokenizer):
    model = small_model(vocab_size=tokenizer.n_words + 3, max_batch_size=16, max_seq_len=256)
    return Llama(model, tokenizer, static=request.param)


def answers(llama, schemas: list[Any], **options: Any):
    """An answer to each schema, all at once. Noise, but not without end: what closes things is likely."""
    closing = {llama.tokenizer.encode(text, bos=False, eos=False)[0]: 2.0 for text in '"]},'}
    sampling = {"temperature": 1.5, "top_p": 1.0, "logit_bias": closing, "max_gen_len": 150, **options}
    ids = llama.tokenizer.encode("Hi", bos=True, eos=False)
    requests = [r for i, s in enumerate(schemas) for r in llama.requests([ids], schema=s, seed=i, **sampling)]
    return collect(stream(llama.engine, llama.tokenizer, requests))


def check(schema: Any, answer: Any) -> None:
    if answer.finish_reason == "stop":
        kind = jsonschema.Draft202012Validator
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(answer.text))
    else:
        assert answer.finish_reason == "length" and len(answer.tokens) == 150


@pytest.mark.slow
def test_answers_fit_their_schema_for_every_keyword(llama):
    found = answers(llama, SCHEMAS * 3)
    for schema, answer in zip(SCHEMAS * 3, found, strict=True):
        check(schema, answer)
    assert sum(answer.finish_reason == "stop" for answer in found) > 0.8 * len(found)


@pytest.mark.slow
def test_answers_fit_random_schemas(llama):
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(300)]
    found = answers(llama, schemas)
    for schema, answer in zip(schemas, found, strict=True):
        check(schema, answer)
    assert sum(answer.finish_reason == "stop" for answer in found) > 0.9 * len(found)


def test_an_answer_is_the_same_alone_and_together_with_penalties_and_prefix_reuse(llama):
    options = {"repetition_penalty": 1.1, "presence_penalty": 0.2, "top_k": 40, "min_p": 0.001}
    together = [answer.text for answer in answers(llama, SCHEMAS[:12], **options)]
    for i, schema in enumerate(SCHEMAS[:12]):
        (alone,) = llama.text_completion(
            ["Hi"], schema=schema, seed=i, temperature=1.5, top_p=1.0, max_gen_len=150, **options,
            logit_bias={llama.tokenizer.encode(text, bos=False, eos=False)[0]: 2.0 for text in '"]},'},
        )  # fmt: skip
        assert alone["generation"] == together[i]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hugging_face", "sentencepiece"])
def test_with_other_tokenizers_whatever_runs_beside(kind, tmp_path):
    """Batch-invariant too: the same bits alone and together."""
    if kind == "hugging_face":
        formats.hf_tokenizer(tmp_path)
        tokenizer = HFTokenizer(tmp_path)
    else:
        (tmp_path / "tokenizer.model").write_bytes(formats.sentencepiece_model(400))
        tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    model = small_model(vocab_size=tokenizer.n_words, max_batch_size=8, max_seq_len=256)
    llama = Llama(model, tokenizer, batch_invariant=True)
    found = answers(llama, SCHEMAS, logprobs=True)
    for schema, answer in zip(SCHEMAS, found, strict=True):
        check(schema, answer)
    assert sum(answer.finish_reason == "stop" for answer in found) > 0.6 * len(found)
    for i in (3, 12):
        schema = SCHEMAS[i]
        again = answers(llama, [True] * i + [schema], logprobs=True)[i]
        assert (again.tokens, again.logprobs) == (found[i].tokens, found[i].logprobs)


def test_unconstrained_requests_beside_constrained_ones_are_as_alone(llama, tokenizer):
    ids = tokenizer.encode("Hi", bos=True, eos=False)
    unknown = {tokenizer.n_words + i: -math.inf for i in range(3)}  # tokens of the model alone
    free = llama.requests([ids], seed=5, max_gen_len=40, logit_bias=unknown)
    (alone,) = collect(stream(llama.engine, tokenizer, free))
    kept = llama.requests([ids] * 4, seed=6, max_gen_len=40, schema={"type": "integer"})
    *_, beside = collect(stream(llama.engine, tokenizer, [*kept, *free]))
    assert beside.tokens == alone.tokens


def test_regular_expressions_and_grammars(llama):
    for seed in range(5):
        (answer,) = llama.text_completion(["Hi"], regex=r"[a-c]{3}-\d{1,4}(x|y)?", temperature=2.0, seed=seed)
        assert re.fullmatch(r"[a-c]{3}-\d{1,4}(x|y)?", answer["generation"])
        lark = 'start: "(" start ")" | "z"'
        (answer,) = llama.text_completion(["Hi"], grammar=lark, temperature=2.0, seed=seed, max_gen_len=60)
        text = answer["generation"]
        depth = text.count("(")
        assert answer["finish_reason"] == "length" or text == "(" * depth + "z" + ")" * depth


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=4)
    age: int = pydantic.Field(ge=0, le=99)
    friend: "Person | None"


def test_pydantic_models_and_streams(llama):
    events = list(llama.stream_text(["Hi"], schema=Person, temperature=1.5, seed=1))
    (answer,) = llama.text_completion(["Hi"], schema=Person, temperature=1.5, seed=1)
    assert "".join(event.text for event in events) == answer["generation"]
    if events[-1].finish_reason == "stop":
        Person.model_validate_json(answer["generation"])


def test_an_answer_that_is_cut_says_so(llama):
    (answer,) = llama.text_completion(["Hi"], schema={"type": "array", "minItems": 50}, max_gen_len=9)
    assert answer["finish_reason"] == "length"


def test_logprobs_are_those_of_the_raw_logits(llama):
    (answer,) = llama.text_completion(["Hi"], schema={"const": "name"}, logprobs=True)
    assert answer["generation"] == '"name"' and all(p < 0 for p in answer["logprobs"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schema": {"uniqueItems": True}}, "schema cannot constrain an answer: .*uniqueItems"),
        ({"schema": {"properties": {"a": {"not": {}}}}}, '"not"'),
        ({"schema": {"if": {}, "then": {}, "x-guidance": {"lenient": True}}}, '"if", "then"'),
        ({"schema": {"type": "string", "format": "idn-email"}}, "idn-email"),
        ({"schema": {"$ref": "#/$defs/gone"}}, "gone"),
        ({"schema": "object"}, "schema must be a JSON Schema"),
        ({"schema": {"const": object()}}, "schema is not a JSON Schema: Object of type object"),
        ({"regex": "("}, "regex cannot constrain an answer: .*unclosed group"),
        ({"regex": 1}, "regex must be a string"),
        ({"grammar": "begin: a"}, "grammar cannot constrain an answer"),
        ({"grammar": None, "regex": "a", "schema": {}}, "schema and regex cannot be combined"),
        ({"schema": {"$ref": "#"}}, "schema cannot constrain an answer: no text fits it"),
        ({"grammar": "start: a\na: b\nb: a"}, "grammar cannot constrain an answer: no text fits it"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(llama, options, says):
    with pytest.raises(ArgumentError, match=f"(?s){says}"):
        llama.text_completion(["Hi"], **options)


def test_a_grammar_that_turns_out_too_complex_ends_its_own_request_only(llama):
    """llguidance gives up on it, once it is in the middle of the answer."""
    names = [f"x{i}" for i in range(3000)]
    rules = "\n".join(f"{name}: /[a-z ]{{0,50}}{name}[a-z ]*/ y" for name in names)
    grammar = f'start: /[a-z]{{3,9}}/ "!" y\ny: {" | ".join(names)} | ""\n{rules}'
    (free,) = llama.text_completion(["Hi"], max_gen_len=30, seed=1)
    beside = llama.stream_text(["Hi"], max_gen_len=30, seed=1)
    next(beside)
    events = list(llama.stream_text(["Hi"], grammar=grammar, max_gen_len=30))
    assert "too complex" in events[-1].error
    assert len(events) > 3
    assert collect(beside)[0].text in free["generation"]
