"""What requests share of the KV cache."""

import pytest
import torch

from llama.engine import Engine
from llama.sampling import SamplingParams
from tests.support.engines import GREEDY, Counter, alone, finish, prompt_of
from tests.support.tiny import small_model


def test_a_next_turn_reads_its_new_tokens_only():
    model = small_model()
    engine = Engine(model)
    first = engine.add(prompt_of(20), GREEDY)
    finish(engine, first)
    count = Counter(model)
    prompt = [*first.prompt, *first.tokens, 1, 2, 3]
    turn = engine.add(prompt, GREEDY)
    finish(engine, turn)
    # The last token drawn was never read, and three are new.
    assert count.lengths()[0] == [4]
    assert turn.reused == len(prompt) - 4
    assert turn.tokens == alone(prompt, GREEDY).tokens


def test_a_slot_is_continued_where_the_whole_of_it_is_wanted():
    engine = Engine(small_model(max_batch_size=3))
    short = SamplingParams(max_tokens=1)
    finish(engine, *(engine.add(prompt, short) for prompt in ([1, 2, 3], [1, 2], [7, 8, 9])))
    assert [slot.tokens for slot in engine.slots.all] == [[1, 2, 3], [1, 2], [7, 8, 9]]
    for prompt, expected in (
        ([1, 2, 3, 4], [[1, 2, 3, 4], [1, 2], [7, 8, 9]]),  # the longest prefix, not the other
        ([7, 8, 9, 9], [[1, 2, 3, 4], [1, 2], [7, 8, 9, 9]]),
        ([20, 21], [[1, 2, 3, 4], [20, 21], [7, 8, 9, 9]]),  # nobody has it: the one unused for longest
    ):
        finish(engine, engine.add(prompt, short))
        assert [slot.tokens for slot in engine.slots.all] == expected


def test_chats_that_begin_alike_share_the_beginning_and_keep_their_slots():
    engine = Engine(small_model(max_batch_size=4))
    system, params = prompt_of(12), SamplingParams(max_tokens=3, logprobs=True)
    first = engine.add([*system, 1], params)
    engine.step()
    others = [engine.add([*system, n, n], params) for n in (2, 3)]  # while the first still runs
    finish(engine, first, *others)
    assert [request.reused for request in others] == [12, 12]
    turns = [engine.add([*r.prompt, *r.tokens, 9], params) for r in (*others, first)]
    finish(engine, *turns)
    for request in (*others, *turns):
        single = alone(request.prompt, params)
        assert request.tokens == single.tokens
        torch.testing.assert_close(request.logprobs, single.logprobs, atol=1e-4, rtol=1e-4)
    assert [len(r.prompt) - r.reused for r in turns] == [2, 2, 2]


def test_the_same_prompt_again_still_has_its_logprobs():
    engine = Engine(small_model(max_batch_size=1))
    params = SamplingParams(max_tokens=3, logprobs=True, prompt_logprobs=True)
    first, second = engine.add(prompt_of(9), params), engine.add(prompt_of(9), params)
    finish(engine, first, second)
    assert first.prompt_logprobs == second.prompt_logprobs
    assert first.tokens == second.tokens


@pytest.mark.parametrize("invariant", [False, True])
def test_two_engines_may_take_turns_over_one_model(invariant):
    """Each finds the cache overwritten by the other, and reads again what it needs."""
    model = small_model(max_batch_size=2)
    params = SamplingParams(max_tokens=20, logprobs=True, prompt_logprobs=True, seed=1)
    engines = [Engine(model, prefill_chunk=8, batch_invariant=invariant) for _ in range(2)]
    requests = [engine.add(prompt_of(11 + i, i), params) for i, engine in enumerate(engines)]
    for steps in (5, 5, 1, 5):  # two for the prompt, and some tokens
        for engine in engines:
            for _ in range(steps):
                engine.step()
    assert all(2 < len(request.tokens) < 20 for request in requests)
    for engine, request in zip(engines, requests, strict=True):
        while engine.has_work():
            engine.step()
        single = alone(request.prompt, params)
        assert request.tokens == single.tokens
        torch.testing.assert_close(request.logprobs, single.logprobs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(request.prompt_logprobs, single.prompt_logprobs, atol=1e-4, rtol=1e-4)
