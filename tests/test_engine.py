import contextlib
import gc
import math

import pytest
import torch

from llama.engine import Engine, PromptError
from llama.sampling import SamplingParams
from tests.support.engines import GREEDY, Counter, alone, finish, prompt_of
from tests.support.tiny import small_model

# A request's tokens depend on the request.


@pytest.fixture(scope="module")
def remembered_alone():
    """`alone`, once for each prompt and seed."""
    found = {}

    def run(prompt, params):
        key = (*prompt, params.seed)
        if key not in found:
            found[key] = alone(prompt, params)
        return found[key]

    return run


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("slots", [1, 2, 7])
def test_alone_is_together(chunk, slots, remembered_alone):
    engine = Engine(small_model(max_batch_size=slots), prefill_chunk=chunk)
    cases = []
    for seed in range(7):
        params = SamplingParams(
            temperature=(0, 1.0, 1.5)[seed % 3],
            top_p=(1.0, 0.8)[seed % 2],
            top_k=(None, 20)[seed % 2],
            repetition_penalty=(1.0, 1.3)[seed % 2],
            frequency_penalty=(0, 0.4, 0)[seed % 3],
            seed=seed,
            max_tokens=6 + seed,
            logprobs=True,
            prompt_logprobs=True,
            top_logprobs=2,
        )
        cases.append(engine.add(prompt_of(1 + 5 * seed, seed), params))
    finish(engine, *cases)
    for request in cases:
        single = remembered_alone(request.prompt, request.params)
        assert request.tokens == single.tokens
        assert request.finish_reason == "length"
        torch.testing.assert_close(request.logprobs, single.logprobs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(request.prompt_logprobs, single.prompt_logprobs, atol=1e-4, rtol=1e-4)
        for mine, other in zip(request.top_logprobs, single.top_logprobs, strict=True):
            assert [token for token, _ in mine] == [token for token, _ in other]


def test_logprobs_are_those_of_one_pass_over_the_same_tokens():
    model = small_model()
    engine = Engine(model, prefill_chunk=4)
    prompt = prompt_of(9)
    request = engine.add(
        prompt, SamplingParams(max_tokens=12, logprobs=True, prompt_logprobs=True, top_logprobs=3)
    )
    finish(engine, request)
    tokens = torch.tensor([[*prompt, *request.tokens]])
    expected = small_model()(tokens, 0)[0].log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    assert request.prompt_logprobs[0] == 0
    seen = torch.tensor([*request.prompt_logprobs[1:], *request.logprobs])
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)
    assert len(request.prompt_top_logprobs) == len(prompt)
    assert len(request.top_logprobs) == 12
    for (token, logprob), pairs in zip(
        zip(request.tokens, request.logprobs, strict=True), request.top_logprobs, strict=True
    ):
        assert len(pairs) == 3
        assert [p for _, p in pairs] == sorted((p for _, p in pairs), reverse=True)
        if token in dict(pairs):
            assert dict(pairs)[token] == pytest.approx(logprob, abs=1e-4)


# Steps and what they cost.


def test_prompts_of_different_lengths_take_one_pass():
    model = small_model()
    engine, count = Engine(model), Counter(model)
    finish(engine, *(engine.add(prompt_of(n), GREEDY) for n in (3, 10, 6)))
    assert count.lengths() == [[3, 10, 6]] + [[1, 1, 1]] * 7


def test_prompts_take_as_many_passes_as_the_longest_has_chunks():
    model = small_model()
    engine, count = Engine(model, prefill_chunk=8), Counter(model)
    finish(engine, *(engine.add(prompt_of(n), SamplingParams(max_tokens=1)) for n in (30, 25, 27)))
    assert count.lengths() == [[8, 8, 8]] * 3 + [[6, 1, 3]]


def test_a_long_prompt_does_not_hold_up_who_runs():
    model = small_model(max_seq_len=512)
    engine = Engine(model, prefill_chunk=16)
    first = engine.add(prompt_of(2), SamplingParams(max_tokens=100))
    engine.step()
    count = Counter(model)
    long = [engine.add(prompt_of(200, seed), GREEDY) for seed in range(2)]
    short = engine.add(prompt_of(5, 3), GREEDY)
    while not all(request.tokens for request in (*long, short)):
        tokens = len(first.tokens)
        engine.step()
        assert len(first.tokens) == tokens + 1
    # Who runs takes a row of one; all that is read beside it stays within the bound.
    assert all(sum(n for n in rows if n > 1) <= 16 for rows in count.lengths())
    # Those who read take turns, so the short prompt did not wait for the long ones.
    assert any(5 in rows for rows in count.lengths()[:3])


def test_only_positions_that_are_needed_reach_the_vocabulary():
    model = small_model()
    seen = []
    logits = model.logits
    model.logits = lambda states: seen.append(len(states)) or logits(states)
    engine = Engine(model, prefill_chunk=8)
    finish(engine, *(engine.add(prompt_of(n), SamplingParams(max_tokens=2)) for n in (20, 5)))
    assert seen == [1, 1, 1, 1]


def test_cost_follows_what_is_alive():
    model = small_model()
    engine, count = Engine(model), Counter(model)
    requests = [engine.add(prompt_of(4, n), SamplingParams(max_tokens=n)) for n in (1, 2, 5)]
    finish(engine, *requests)
    assert count.lengths() == [[4, 4, 4], [1, 1], [1], [1], [1]]
    engine.step()
    assert len(count.steps) == 5  # nobody there, nothing runs


def test_no_token_asked_for_reads_the_prompt_and_draws_nothing():
    model = small_model()
    engine = Engine(model, prefill_chunk=4)
    params = SamplingParams(max_tokens=0, logprobs=True, prompt_logprobs=True)
    request = engine.add(prompt_of(64), params)  # fills the whole context
    finish(engine, request)
    assert (request.finish_reason, request.tokens, len(request.prompt_logprobs)) == ("length", [], 64)


# Joining and leaving.


def test_a_free_slot_is_taken_at_once():
    engine = Engine(small_model(max_batch_size=2))
    long = engine.add(prompt_of(3), SamplingParams(max_tokens=20))
    short = engine.add(prompt_of(4), SamplingParams(max_tokens=2))
    third = engine.add(prompt_of(5), SamplingParams(max_tokens=3))
    engine.step()
    engine.step()
    assert short.finish_reason == "length"
    assert third.slot is None
    engine.step()
    assert third.slot is not None
    assert len(third.tokens) == 1
    assert len(long.tokens) == 3


def test_cancel_at_any_time_frees_the_slot_and_leaves_the_others():
    engine = Engine(small_model(max_batch_size=2), prefill_chunk=4)
    runs = engine.add(prompt_of(3), SamplingParams(max_tokens=12))
    reads = engine.add(prompt_of(30), GREEDY)
    waits = engine.add(prompt_of(5), GREEDY)
    last = engine.add(prompt_of(6), GREEDY)
    engine.step()
    for request in (reads, waits):
        engine.cancel(request)
        engine.cancel(request)  # nothing more happens
        assert request.finish_reason == "cancelled"
    engine.step()
    assert last.slot is not None
    finish(engine, runs, last)
    assert runs.tokens == alone(runs.prompt, runs.params).tokens
    assert last.tokens == alone(last.prompt, last.params).tokens
    assert not engine.has_work()


def test_interleaved_iterators_each_get_all_their_own():
    engine = Engine(small_model())
    first, second = (engine.add(prompt_of(3, seed), GREEDY) for seed in range(2))
    one, two = engine.run([first]), engine.run([second])
    seen: dict[int, list] = {0: [], 1: []}
    for _ in range(9):
        for i, events in enumerate((one, two)):
            seen[i].append(next(events))
    for i, request in enumerate((first, second)):
        assert [event.token for event in seen[i]] == [*request.tokens, None]
        assert seen[i][-1].finish_reason == "length"


def test_a_consumer_that_leaves_frees_its_slots():
    engine = Engine(small_model(max_batch_size=2))
    other = engine.add(prompt_of(3), GREEDY)
    requests = [engine.add(prompt_of(4, n), GREEDY) for n in range(3)]
    events = engine.run(requests)
    next(events)
    events.close()
    assert [r.finish_reason for r in requests] == ["cancelled"] * 3

    def raising():
        for _ in engine.run([mine]):
            raise KeyError("in the consumer")

    mine = engine.add(prompt_of(4), GREEDY)
    with pytest.raises(KeyError):
        raising()
    gc.collect()
    assert mine.finish_reason == "cancelled"
    finish(engine, other)
    assert other.tokens == alone(other.prompt, GREEDY).tokens


def test_a_consumer_that_stops_reading_misses_nothing_later():
    engine = Engine(small_model())
    slow = engine.add(prompt_of(3), GREEDY)
    events = engine.run([slow])
    first = next(events).token
    finish(engine, engine.add(prompt_of(4), SamplingParams(max_tokens=20)))
    assert slow.finish_reason == "length"
    assert [first, *(event.token for event in events)] == [*slow.tokens, None]


# Faults.


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1, 64], "64 is not a token id: ids run from 0 to 63"),
        ([-1], "-1 is not a token id"),
        (["a"], "'a' is not a token id"),
        ([1.0], "1.0 is not a token id"),
        ([0] * 64, "max_seq_len=64"),
        ([0] * 100, "the prompt has 100 tokens"),
    ],
)
def test_impossible_prompts_are_refused_and_leave_nothing(prompt, message):
    engine = Engine(small_model())
    with pytest.raises(PromptError, match=message):
        engine.add(prompt, GREEDY)
    assert not engine.has_work()


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="logit_bias names 64"):
        Engine(small_model()).add([1], SamplingParams(logit_bias={64: 1.0}))


def test_broken_logits_end_one_request_and_say_which():
    model = small_model()
    model.tok_embeddings.weight[13] = math.nan  # a damaged row of the checkpoint
    engine = Engine(model, prefill_chunk=4)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=8, logit_bias={13: -math.inf}, logprobs=True)
    fine, broken, late = (engine.add(p, params) for p in ([1, 2, 3], [4, 13, 5], [6] * 9))
    events = list(engine.run([fine, broken, late]))
    error = next(event for event in events if event.finish_reason == "error")
    assert error.request is broken
    assert error.error == broken.error
    assert broken.error.startswith("the model's logits are not finite")
    assert broken.tokens == []
    for request in (fine, late):
        assert (request.finish_reason, len(request.tokens)) == ("length", 8)
        assert request.tokens == alone(request.prompt, params).tokens
    assert not any(13 in slot.tokens for slot in engine.slots.all)  # nobody builds on what is broken


def test_nobody_builds_on_what_is_broken():
    """A damaged token spoils the others of its chunk; whoever left before that showed left no trace."""
    model = small_model(max_batch_size=1)
    model.tok_embeddings.weight[13] = math.nan
    engine = Engine(model)
    begin = [7] * 9
    finish(engine, engine.add([*begin, 13, 1], SamplingParams(max_tokens=0)))
    fine = engine.add([*begin, 8], GREEDY)
    finish(engine, fine)
    assert fine.tokens == alone(fine.prompt, GREEDY).tokens
    scored = SamplingParams(max_tokens=0, logprobs=True, prompt_logprobs=True)
    broken = engine.add([*begin, 13, 1], scored)
    finish(engine, broken)
    assert broken.finish_reason == "error"


def test_a_step_that_raises_can_be_repeated():
    model = small_model()
    engine = Engine(model, prefill_chunk=4)
    params = SamplingParams(seed=1, max_tokens=8, logprobs=True, prompt_logprobs=True)
    requests = [engine.add(prompt_of(n, n), params) for n in (3, 11)]
    hidden, logits = model.hidden, model.logits

    def fails(*_):
        raise MemoryError("for once")

    for step in range(12):
        name = ("hidden", "logits")[step % 2]
        setattr(model, name, fails)
        with contextlib.suppress(MemoryError):  # no logits are asked for in the middle of a prompt
            engine.step()
        model.hidden, model.logits = hidden, logits
        engine.step()
    for request in requests:
        single = alone(request.prompt, params)
        assert (request.tokens, len(request.prompt_logprobs)) == (single.tokens, len(request.prompt))


def test_a_bad_chunk_is_refused():
    with pytest.raises(ValueError, match="prefill_chunk must be 1 or more, not 0"):
        Engine(small_model(), prefill_chunk=0)


def test_no_global_side_effects():
    state, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    engine = Engine(small_model(dtype=torch.bfloat16))
    finish(engine, engine.add(prompt_of(5), SamplingParams(seed=4, max_tokens=9)))
    assert torch.get_rng_state().equal(state)
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
