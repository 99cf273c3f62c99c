"""A constraint decides which tokens may come next."""

import math
from collections.abc import Sequence
from itertools import takewhile

import pytest
import torch

from llama.engine import Engine, Request
from llama.sampling import SamplingParams
from tests.support.tiny import small_model


class OneOf:
    """Allows one of some sequences of tokens, and nothing else."""

    def __init__(self, *allowed: Sequence[int]) -> None:
        self.allowed = [list(tokens) for tokens in allowed]

    def mask(self, answer: Sequence[int], logits: torch.Tensor) -> None:
        n = len(answer)
        following = [tokens[n] for tokens in self.allowed if tokens[:n] == list(answer) and len(tokens) > n]
        forbidden = torch.ones_like(logits, dtype=torch.bool)
        forbidden[following] = False
        logits.masked_fill_(forbidden, -math.inf)

    def forced(self, answer: Sequence[int]) -> Sequence[int]:
        n = len(answer)
        columns = zip(*(tokens[n:] for tokens in self.allowed if tokens[:n] == list(answer)), strict=False)
        return [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]

    def finished(self, answer: Sequence[int]) -> bool:
        return list(answer) in self.allowed


def run(engine: Engine, *requests: Request) -> None:
    for _ in engine.run(requests):
        pass


SEQUENCES = [7, 7, 7], [7, 9, 11, 13], [60, 3]


@pytest.mark.parametrize("static", [False, True], ids=["ragged", "static"])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_only_what_is_allowed_is_generated_and_others_go_on(static: bool, temperature: float) -> None:
    engine = Engine(small_model(max_batch_size=4), static=static)
    free = SamplingParams(temperature=0.8, seed=3, max_tokens=12)
    alone = engine.add([5, 6], free)
    run(engine, alone)
    beside = engine.add([5, 6], free)
    requests = [
        engine.add(
            [1, 2, i], SamplingParams(temperature=temperature, top_p=1, seed=i), constraint=OneOf(*SEQUENCES)
        )
        for i in range(16)
    ]
    run(engine, beside, *requests)
    assert beside.tokens == alone.tokens
    assert {request.finish_reason for request in requests} == {"stop"}
    seen = {tuple(request.tokens) for request in requests}
    assert seen <= {tuple(tokens) for tokens in SEQUENCES}
    assert len(seen) > 1 or not temperature


def test_it_comes_after_penalties_and_biases() -> None:
    engine = Engine(small_model())
    biased = SamplingParams(temperature=0, logit_bias={20: 1e9, 60: -1e9, 7: -1e9, 9: 5})
    request = engine.add([1, 2], biased, constraint=OneOf([60, 3], [9, 9]))
    run(engine, request)
    assert request.tokens == [9, 9]


def test_a_constraint_that_allows_nothing_ends_its_request_alone() -> None:
    engine = Engine(small_model())
    stuck = engine.add([1, 2], SamplingParams(temperature=0.9), constraint=OneOf())
    other = engine.add([1, 2], SamplingParams(max_tokens=4))
    run(engine, stuck, other)
    assert stuck.finish_reason == "error"
    assert stuck.error
    assert stuck.error.startswith("no token may follow")
    assert (other.finish_reason, len(other.tokens)) == ("length", 4)


@pytest.mark.parametrize("static", [False, True], ids=["ragged", "static"])
def test_forced_tokens_are_read_together_and_not_sampled(static: bool) -> None:
    engine = Engine(small_model(), static=static)
    beginning, middle = [1, 2, 3, 4], [5, 6, 7, 8, 9]
    allowed = OneOf(
        [*beginning, 10, *middle, 11], [*beginning, 12, *middle, 13], [*beginning, 12, *middle, 14]
    )
    request = engine.add([20, 21], SamplingParams(temperature=0, logit_bias={12: 50}), constraint=allowed)
    run(engine, request)
    assert request.tokens[:-1] == [*beginning, 12, *middle]
    assert engine.steps == 3  # the prompt with the beginning in two, and the middle

    model = engine.model
    whole = torch.tensor([[20, 21, *request.tokens[:-1]]])
    logits = model(whole, 0)[0, -1]
    assert request.tokens[-1] == (13 if logits[13] > logits[14] else 14)


def test_logprobs_of_forced_tokens_are_the_models_own() -> None:
    engine = Engine(small_model())
    request = engine.add([20, 21], SamplingParams(logprobs=True), constraint=OneOf([1, 2, 3]))
    run(engine, request)
    assert request.tokens == [1, 2, 3]
    logits = engine.model(torch.tensor([[20, 21, 1, 2]]), 0)[0, 1:]
    expected = logits.log_softmax(-1)[range(3), [1, 2, 3]]
    assert request.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_answer_without_a_choice_needs_no_step() -> None:
    engine = Engine(small_model())
    whole = engine.add([20], SamplingParams(), constraint=OneOf([1, 2, 3]))
    cut = engine.add([20], SamplingParams(max_tokens=2), constraint=OneOf([1, 2, 3]))
    run(engine, whole)
    assert (whole.tokens, whole.finish_reason, engine.steps) == ([1, 2, 3], "stop", 0)
    run(engine, cut)
    assert (cut.tokens, cut.finish_reason) == ([1, 2], "length")
