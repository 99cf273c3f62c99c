"""What callers may pass, what becomes of it, and what is refused before anything runs."""

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llama import Llama
from llama.errors import ArgumentError, PromptError
from llama.noise import derive_seed
from tests.support.tiny import byte_tokenizer, small_model

DRAWN = {"temperature": 1.5, "top_p": 1.0, "max_gen_len": 12}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    tokenizer = byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Llama(small_model(vocab_size=tokenizer.n_words, max_batch_size=3, max_seq_len=128), tokenizer)


@pytest.mark.parametrize(
    "ids",
    [
        (1, 2, 3),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], dtype=np.uint8),
        torch.tensor([1, 2, 3]),
        [np.int32(1), torch.tensor(2), 3],
        iter([1, 2, 3]),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_ids_in_any_form(llama: Llama, ids: object) -> None:
    expected = llama.generate([[1, 2, 3]], seed=5, **DRAWN)
    assert llama.generate([ids], seed=5, **DRAWN) == expected


def test_batches_in_any_form(llama: Llama) -> None:
    expected = llama.generate([[1, 2], [3, 4]], seed=5, **DRAWN)
    for batch in (np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]]), iter([[1, 2], (3, 4)])):
        assert llama.generate(batch, seed=5, **DRAWN) == expected
    texts = llama.text_completion(["a", "b"], seed=5, **DRAWN)
    assert llama.text_completion((text for text in "ab"), seed=5, **DRAWN) == texts


def test_numbers_of_numpy(llama: Llama) -> None:
    plain = {"temperature": 1.5, "top_k": 9, "seed": 7, "n": 2, "logprobs": True, "stop_token_ids": [9]}
    numpy = {
        "temperature": np.float32(1.5),
        "top_k": np.int64(9),
        "seed": np.uint64(7),
        "n": np.array(2),
        "logprobs": np.bool_(True),
        "stop_token_ids": np.array([9]),
        "logit_bias": {np.int64(1): np.float64(0)},
    }
    expected = llama.generate([[1]], max_gen_len=5, logit_bias={1: 0.0}, **plain)
    assert llama.generate([[1]], max_gen_len=np.int64(5), **numpy) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.0}, "seed must be a whole number, not 1.0"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"seed": "1"}, "seed must be a whole number, not '1'"),
        ({"seed": [1, 2]}, "seed has 2 entries, but there are 1 answers"),
        ({"seed": [1.5]}, "seed must be a whole number, not 1.5"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids, not 3"),
        ({"stop_token_ids": [True]}, "stop_token_ids: True is not a token id"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be a list of token ids, not '12'"),
        ({"logprobs": 5}, "logprobs must be True or False, not 5"),
        ({"echo": "yes"}, "echo must be True or False, not 'yes'"),
        ({"n": 0}, "n must be a whole number, 1 or more, not 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number, 0 or more, not 2.0"),
        ({"max_gen_len": 2, "max_tokens": 2}, "max_gen_len and max_tokens are names for the same limit"),
        ({"temprature": 1}, r"unknown argument 'temprature' \(did you mean temperature\?\); use one of n, "),
        ({"qqq": 1}, "unknown argument 'qqq'; use one of .*max_gen_len"),
        ({"temperature": "hot"}, "temperature must be"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_the_words_of_the_caller(llama: Llama, options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        llama.generate([[1]], **options)
    assert not issubclass(caught.type, PromptError)
    assert not llama.engine.has_work()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, True]], "prompt 0: True is not a token id"),
        ([[1], [2.0]], "prompt 1: 2.0 is not a token id"),
        ([np.array([0.5])], "prompt 0: 0.5 is not a token id"),
        ([1, 2], "prompt 0 must be a list of token ids, not 1"),
        (["ab"], "prompt 0 must be a list of token ids, not 'ab'"),
        ("ab", "prompts must be a list"),
        (5, "prompts must be a list"),
        pytest.param(iter([]), "no prompts", id="an empty iterator"),
    ],
    ids=str,
)
def test_what_is_not_a_prompt(llama: Llama, prompts: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        llama.generate(prompts)  # type: ignore[arg-type]


def test_names_of_the_limit(llama: Llama) -> None:
    expected = llama.generate([[1, 2]], 5, temperature=0)
    assert llama.generate([[1, 2]], temperature=0, max_tokens=5) == expected
    assert llama.generate([[1, 2]], temperature=0, max_new_tokens=5) == expected
    assert llama.generate([[1, 2]], temperature=0, max_gen_len=5, max_tokens=None) == expected


def test_several_answers_to_each_prompt(llama: Llama) -> None:
    answers = llama.text_completion(["a", "b"], n=3, seed=4, **DRAWN)
    assert len({answer["generation"] for answer in answers}) == 6
    assert answers[0] == llama.text_completion(["a"], seed=4, **DRAWN)[0]
    seeds = [4, derive_seed(4, 1), derive_seed(4, 2)]
    assert answers == llama.text_completion(["a", "b"], n=3, seed=2 * seeds, **DRAWN)
    assert answers[3:] == [llama.text_completion(["b"], seed=seed, **DRAWN)[0] for seed in seeds]
    assert answers[:3] == llama.text_completion(["a"] * 3, seed=np.array(seeds, np.uint64), **DRAWN)


def test_answers_say_how_they_ended(llama: Llama) -> None:
    (answer,) = llama.text_completion(["a"], seed=4, **DRAWN)
    assert answer["finish_reason"] == "length"
    stopped = llama.text_completion(["a"], seed=4, stop=answer["generation"][3], **DRAWN)
    assert stopped[0]["finish_reason"] == "stop"
    chat = llama.chat_completion([[{"role": "user", "content": "a"}]], seed=4, **DRAWN)
    assert chat[0]["finish_reason"] in ("stop", "length")


def test_an_answer_that_was_begun_is_continued(llama: Llama) -> None:
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is "}]
    ids = llama.formatter.encode_dialog_prompt(dialog[:1])  # type: ignore[arg-type]
    ids += llama.tokenizer.encode("It is ", bos=False, eos=False)
    (tokens,), _ = llama.generate([ids], seed=4, **DRAWN)
    (answer,) = llama.chat_completion([dialog], seed=4, **DRAWN)  # type: ignore[list-item]
    assert answer["generation"]["content"] == llama.tokenizer.decode(tokens)
    for content in (3, None):
        with pytest.raises(ArgumentError, match="text"):
            llama.chat_completion([[dialog[0], {"role": "assistant", "content": content}]])  # type: ignore


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 2.5}, "max_seq_len must be a whole number, 1 or more, not 2.5"),
        ({"max_batch_size": True}, "max_batch_size must be a whole number, 1 or more, not True"),
        ({"model_parallel_size": 0}, "model_parallel_size must be a whole number, 1 or more, not 0"),
        ({"seed": "x"}, "seed must be a whole number, not 'x'"),
        ({"batch_invariant": 1}, "batch_invariant must be True or False, not 1"),
        ({"device": "tpu"}, "device must be cpu, cuda, cuda:N or mps, not 'tpu'"),
        ({"device": 3.5}, "device must be cpu, cuda, cuda:N or mps, not '3.5'"),
        ({"device": "cuda:77"}, "device is cuda:77, but PyTorch finds . CUDA devices"),
        ({"dtype": "int3"}, "dtype must be"),
        ({"quantize": "int3"}, "int3"),
        ({"compile": "yes"}, "compile must be"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_the_model_is_looked_for(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Llama.build(Path("there is no such folder"), **options)


def test_streams_for_asyncio(llama: Llama) -> None:
    dialogs = [[{"role": "user", "content": text}] for text in "abcde"]

    async def answers() -> list[str]:
        async def one(dialog: list) -> str:
            return "".join([event.text async for event in llama.astream_chat([dialog], seed=4, **DRAWN)])

        return list(await asyncio.gather(*map(one, dialogs)))

    expected = [a["generation"]["content"] for a in llama.chat_completion(dialogs, seed=4, **DRAWN)]  # type: ignore
    assert asyncio.run(answers()) == expected


def test_an_asyncio_stream_tells_mistakes_at_the_call_and_failures_as_they_come(llama: Llama) -> None:
    with pytest.raises(ArgumentError, match="top_p"):
        llama.astream_text(["a"], top_p=7)

    async def first(**options: object) -> object:
        events = llama.astream_text(["a"], temperature=0, **options)  # type: ignore[arg-type]
        event = await anext(events)
        await events.aclose()
        return event

    assert asyncio.run(first(max_gen_len=100)).token is not None  # type: ignore[attr-defined]
    for _ in range(200):
        if not llama.engine.has_work():
            break
        asyncio.run(asyncio.sleep(0.01))
    assert not llama.engine.has_work()
    assert asyncio.run(first(logit_bias=dict.fromkeys(range(200), -math.inf), max_gen_len=1)).token >= 200  # type: ignore
