"""The compiled choice of tokens against sampling.py's."""

import math

import pytest
import torch

from llama.engine import Request
from llama.sampling import BROKEN, FORBIDDEN, SamplingParams, sample
from tests.support.tiny import small_model
from tests.test_native import step_of

TEMPERATURES, TOP_P, MIN_P = (
    (0.0, 0.01, 0.6, 1.0, 1.5),
    (0.0, 0.5, 0.9, 0.95, 1.0, 1.0),
    (0.0, 0.0, 0.05, 0.5),
)
TOP_K = (None, None, 1, 50, 2000)


@pytest.mark.parametrize("vocab_size", [37, 1000, 20_000])
@pytest.mark.parametrize("spread", [0.1, 1, 4])
def test_tokens_are_those_of_sampling(target: str | None, vocab_size: int, spread: float) -> None:
    step = step_of(small_model(vocab_size=vocab_size, dim=32), "fp32", target)
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        logits = torch.randn(3, vocab_size, generator=generator) * spread
        if i % 7 == 0:
            logits[:, ::3] = -math.inf
        requests = [
            Request(
                [1],
                SamplingParams(
                    temperature=TEMPERATURES[n % 5],
                    top_p=TOP_P[n // 2 % 6],
                    top_k=TOP_K[n // 3 % 5],
                    min_p=MIN_P[n // 5 % 4],
                    seed=n,
                ),
                0,
                tokens=[0] * i,
            )
            for n in range(3 * i, 3 * i + 3)
        ]
        together = sample(logits, requests, step.choose)
        assert together.equal(sample(logits, requests)), [request.params for request in requests]
        assert together[1:2].equal(sample(logits[1:2], requests[1:2], step.choose))


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_extreme_temperatures(target: str | None, temperature: float, top_p: float) -> None:
    step = step_of(small_model(vocab_size=1000, dim=32), "fp32", target)
    logits = torch.randn(1000, 60, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    logits[:, ::2] = -math.inf
    params = [SamplingParams(temperature=temperature, top_p=top_p, seed=seed) for seed in range(60)]
    requests = [Request([1], p, 0) for p in params]
    assert sample(logits, requests, step.choose).equal(sample(logits, requests))


def test_what_cannot_be_chosen(target: str | None) -> None:
    step = step_of(small_model(vocab_size=40, dim=32), "fp32", target)
    logits = torch.zeros(5, 40)
    logits[0, 39], logits[1, 0], logits[2], logits[3, 1:] = math.nan, math.inf, -math.inf, -math.inf
    logits[4, 7] = 3
    for params in (SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(top_k=3, min_p=1.0)):
        tokens = sample(logits, [Request([1], params, 0)] * 5, step.choose).tolist()
        assert tokens[:4] == [BROKEN, BROKEN, FORBIDDEN, 0]
        assert params.temperature or tokens[4] == 7
