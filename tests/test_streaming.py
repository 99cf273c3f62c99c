import dataclasses
import gc
import itertools
import math
import random

import pytest
import torch

from llama import Llama
from llama.engine import PromptError
from llama.errors import ArgumentError
from llama.tokenizer.text_stream import TextStream
from tests.support.tiny import byte_tokenizer, small_model

WORDS = ("the", " llama", "🦙", "and", "ands", "STOP")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), words=WORDS)


@pytest.fixture
def llama(tokenizer):
    return Llama(small_model(vocab_size=tokenizer.n_words, max_batch_size=3, max_seq_len=128), tokenizer)


def pieces(tokenizer, tokens, stop=()):
    stream = TextStream(tokenizer, stop)
    out = []
    for token in tokens:
        out.append(stream.push(token))
    return [*out, stream.flush()], stream


def cuts(data: bytes):
    """Every way to cut some bytes in two or three tokens, and into single ones."""
    yield from ([data[:i], data[i:j], data[j:]] for i in range(len(data)) for j in range(i, len(data)))
    yield [bytes([byte]) for byte in data]


class Cut:
    """A tokenizer whose tokens are the parts of one cut."""

    def __init__(self, parts):
        self.parts = parts

    def decode_bytes(self, t):
        return b"".join(self.parts[token] for token in t)

    def decode(self, t):
        return self.decode_bytes(t).decode("utf-8", "replace")


# Text


def test_characters_come_whole():
    for parts in cuts("a🦙ß→\N{FAMILY}".encode()):
        seen, _ = pieces(Cut(parts), range(len(parts)))
        assert "".join(seen) == "a🦙ß→\N{FAMILY}"
        assert not any("\ufffd" in piece for piece in seen)


@pytest.mark.parametrize("data", [b"\xff\xf0\x9f", b"a\xf0\x9f\xa6b", b"\xc3", b"\xe2\x82\xff\xe2\x82\xac"])
def test_broken_utf8_is_what_decoding_at_once_gives(data):
    for parts in cuts(data):
        assert "".join(pieces(Cut(parts), range(len(parts)))[0]) == data.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two STOP three", ["STOP"], "one two "),
        ("one STO", ["STOP"], "one STO"),  # only a beginning
        ("STSTOP", ["STOP"], "ST"),
        ("aab", ["ab"], "a"),
        ("STOP", ["STOP"], ""),
        ("xabcd", ["bcd", "abc"], "x"),  # complete first
        ("xabcd", ["bcd", "abcd"], "x"),  # complete together: the longer
        ("xabc!", ["abcd", "c!"], "xab"),
        ("a🦙b", ["🦙"], "a"),
        ("line\n\nnext", ["\n\n"], "line"),
        ("none", ["x", "y"], "none"),
    ],
)
def test_stop_strings_cut_the_same_wherever_tokens_end(text, stop, expected):
    for parts in cuts(text.encode()):
        seen, stream = pieces(Cut(parts), range(len(parts)), stop)
        joined = ""
        for piece in seen:  # nothing is ever shown that has to be taken back
            joined += piece
            assert expected.startswith(joined)
        assert joined == expected
        assert (stream.stopped is not None) == any(s in text for s in stop)
        if stream.stopped:
            assert stream.push(0) == stream.flush() == ""


def test_random_text_and_stops_agree_with_a_search_from_the_left():
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(generator.choices("ab🦙", k=12))
        stop = ["".join(generator.choices("ab🦙", k=generator.randint(1, 4))) for _ in range(2)]
        ends = [(text.find(s) + len(s), -len(s)) for s in stop if s in text]
        expected = text[: min(ends)[0] + min(ends)[1]] if ends else text
        data = text.encode()
        borders = sorted(generator.sample(range(len(data)), 4))
        parts = [data[a:b] for a, b in itertools.pairwise([0, *borders, len(data)])]
        assert "".join(pieces(Cut(parts), range(len(parts)), stop)[0]) == expected


def test_the_space_before_a_first_word_goes_where_the_tokenizer_drops_it():
    class Pieces(Cut):
        def decode(self, t):
            return super().decode(t).removeprefix(" ")

    tokens = [b"", b" one", b" two"]
    assert "".join(pieces(Pieces(tokens), range(3))[0]) == Pieces(tokens).decode(range(3)) == "one two"
    assert "".join(pieces(Cut(tokens), range(3))[0]) == " one two"


# Streams


SAMPLED = {"temperature": 1.5, "top_p": 1.0, "max_gen_len": 40, "seed": 3}


def joined(events, n):
    texts, ends = [""] * n, {}
    for event in events:
        assert event.index not in ends
        texts[event.index] += event.text
        if event.finish_reason:
            ends[event.index] = event
    assert sorted(ends) == list(range(n))
    return texts, [ends[i] for i in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"echo": True}, {"stop": ["q", "\n"]}, {"frequency_penalty": 2.0}], ids=str
)
def test_joined_pieces_are_the_answer(llama, tokenizer, options):
    prompts = ["the llama", "🦙", "", "and then", "STO"]
    options = {**SAMPLED, **options}
    answers = llama.text_completion(prompts, **options)
    texts, ends = joined(llama.stream_text(prompts, **options), 5)
    assert texts == [answer["generation"] for answer in answers]
    if "stop" not in options:
        ids, _ = llama.generate(
            [tokenizer.encode(p, bos=True, eos=False) for p in prompts],
            **options,
        )
        assert texts == [tokenizer.decode(tokens) for tokens in ids]
    assert any(end.finish_reason == "length" for end in ends)


def test_dialogs_stream_too(llama):
    dialogs = [[{"role": "user", "content": c}] for c in ("the", "🦙")]
    answers = llama.chat_completion(dialogs, **SAMPLED)
    texts, _ = joined(llama.stream_chat(dialogs, **SAMPLED), 2)
    assert texts == [answer["generation"]["content"] for answer in answers]


@pytest.mark.slow
def test_stop_strings_across_token_borders(llama, tokenizer):
    """The answer is single bytes and words; its own middle serves as the stop string."""
    free = llama.text_completion(["the"], **SAMPLED)[0]["generation"]
    plain = [i for i in range(2, len(free) - 5) if "\ufffd" not in free[i : i + 3]]
    for i in plain:
        stop = free[i : i + 3]
        (text,), (end,) = joined(llama.stream_text(["the"], stop=[stop], **SAMPLED), 1)
        assert text == free[: free.find(stop)]
        assert end.finish_reason == "stop"
        assert llama.text_completion(["the"], stop=stop, **SAMPLED)[0]["generation"] == text
    assert plain
    assert not llama.engine.has_work()


def test_events_carry_what_happened(llama, tokenizer):
    prompt = tokenizer.encode("the llama", bos=True, eos=False)
    options = {**SAMPLED, "logprobs": True, "top_logprobs": 2, "echo": True}
    events = list(llama.stream_tokens([prompt], **options))
    result = llama.text_completion(["the llama"], **options)[0]
    assert [event.token for event in events[: len(prompt)]] == prompt
    assert events[0].logprob == 0
    assert [tokenizer.decode([event.token]) for event in events[:-1]] == result["tokens"]
    assert [event.logprob for event in events[:-1]] == result["logprobs"]
    assert [len(top) for top in result["top_logprobs"]] == [0] + [2] * (len(events) - 2)
    stats = events[-1].stats
    assert (stats.prompt_tokens, stats.new_tokens) == (len(prompt), 40)
    assert stats.first_token_seconds > 0
    assert stats.tokens_per_second > 0
    assert all(event.stats is None for event in events[:-1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        events[0].text = ""


def test_stop_token_ids_of_the_call(llama, tokenizer):
    (tokens,), _ = llama.generate([[1, 2, 3]], **SAMPLED)
    token = tokens[7]
    (cut,), _ = llama.generate([[1, 2, 3]], stop_token_ids=[token], **SAMPLED)
    assert cut == tokens[: tokens.index(token)]


def test_closing_early_frees_the_slots(llama):
    events = llama.stream_text(["the"] * 5, **SAMPLED)
    assert not llama.engine.has_work()  # nothing is queued before somebody reads
    for _ in range(4):
        next(events)
    assert llama.engine.has_work()
    events.close()
    assert not llama.engine.has_work()
    events = llama.stream_text(["the"] * 5, **SAMPLED)
    next(events)
    del events
    gc.collect()
    assert not llama.engine.has_work()


def test_streams_may_be_read_in_turn(llama):
    alone = [joined(llama.stream_text([p], **SAMPLED), 1)[0] for p in ("the", "and")]
    one, two = (llama.stream_text([p], **SAMPLED) for p in ("the", "and"))
    seen = ["", ""]
    for events in itertools.zip_longest(one, two):
        for i, event in enumerate(events):
            seen[i] += event.text if event else ""
    # One reads while the other, whose step it is, is behind.
    assert [[text] for text in seen] == alone
    late = llama.stream_text(["the"], stop=[alone[0][0][10:13]], **SAMPLED)
    next(late)
    joined(llama.stream_text(["and"], **SAMPLED), 1)
    assert joined(late, 1)[1][0].finish_reason == "stop"


def test_one_failure_leaves_the_others(llama, tokenizer):
    llama.model.tok_embeddings.weight[ord("X")] = math.nan
    ban = {"logit_bias": {ord("X"): -math.inf}}
    texts, ends = joined(llama.stream_text(["the", "X", "and"], **SAMPLED, **ban), 3)
    assert [end.finish_reason == "error" for end in ends] == [False, True, False]
    assert ends[1].error.startswith("prompt 1: the model's logits are not finite")
    assert texts[0] == joined(llama.stream_text(["the"], **SAMPLED, **ban), 1)[0][0]
    with pytest.raises(RuntimeError, match="prompt 1: the model's logits are not finite"):
        llama.text_completion(["the", "X"], **SAMPLED, **ban)
    assert not llama.engine.has_work()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1: the prompt is empty"),
        ([[1], [2], [10_000]], {}, "prompt 2: 10000 is not a token id"),
        ([], {}, "no prompts"),
        ([[1]], {"temperature": -1}, "temperature must be 0"),
        ([[1]], {"stop": ""}, "stop must be"),
        ([[1]], {"stop": ["a", 3]}, "stop must be"),
        ([[1]], {"stop": 3}, "stop must be"),
        ([[1]], {"logit_bias": {10_000: 1}}, "prompt 0: logit_bias names 10000"),
        ([[1]], {"top_logprobs": 2}, "top_logprobs=2 needs logprobs=True"),
    ],
)
def test_mistakes_are_told_at_the_call(llama, prompts, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        llama.stream_tokens(prompts, **options)
    assert issubclass(caught.type, PromptError) == message.endswith(("empty", "id"))
    assert not llama.engine.has_work()


def test_unknown_arguments_are_refused(llama):
    with pytest.raises(ArgumentError, match=r"'topk' \(did you mean top_k\?\); use one of .*max_gen_len"):
        llama.stream_text(["the"], topk=3)


def test_ids_have_no_alternatives(llama):
    with pytest.raises(ValueError, match="generate returns no top_logprobs"):
        llama.generate([[1]], logprobs=True, top_logprobs=2)


def test_seeds(llama, tokenizer):
    options = {**SAMPLED, "seed": None}
    first = llama.text_completion(["the", "the"], **options)
    assert first[0] != first[1]  # each prompt draws for itself
    again = Llama(llama.model, tokenizer)
    assert again.text_completion(["the", "the"], **options) == first  # a program repeats itself
    assert again.text_completion(["the", "the"], **options) != first
    assert Llama(llama.model, tokenizer, seed=2).text_completion(["the", "the"], **options) != first
    state = torch.get_rng_state()
    fixed = llama.text_completion(["the", "and", "the"], **SAMPLED)
    assert fixed[0] == fixed[2] == llama.text_completion(["the"], **SAMPLED)[0]
    assert torch.get_rng_state().equal(state)
