"""Batch invariance: the same bits in any company."""

import pytest
import torch

from llama.engine import Engine
from llama.engine.invariance import check_batch_invariance
from llama.sampling import SamplingParams
from tests.support.engines import finish, prompt_of
from tests.support.quantized import KEPT, PACKED, reloaded
from tests.support.tiny import small_model


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp32", "bf16", "packed", "int8", "int4"])
def test_batch_invariance_is_bitwise(weights):
    """Rows, slots, chunks, company, order of arrival, reuse: none of it shows in any bit."""
    params = SamplingParams(
        temperature=1.2, max_tokens=5, logprobs=True, prompt_logprobs=False, top_logprobs=2, seed=5
    )

    # Wide enough that products, and sums over the vocabulary, of one row and of eight do run other kernels.
    shape = dict(dim=128, n_heads=8, n_kv_heads=4, vocab_size=20_000, max_batch_size=8)
    model = small_model(std=0.1, dtype=torch.float32 if weights == "fp32" else torch.bfloat16, **shape)
    if weights == "packed":
        model = reloaded(model, PACKED)
    elif weights.startswith("int"):
        model = reloaded(model, KEPT, weights)

    def engine_of():
        return Engine(model, prefill_chunk=16, batch_invariant=True)

    prompts = [prompt_of(n, n) for n in (3, 16, 17, 40, 1, 33, 32, 20, 9, 5)]
    prompts += [[*prompts[3], *prompt_of(9, 77)], [*prompts[5][:32], 1], prompts[6]]
    expected = []
    for prompt in prompts:
        engine = engine_of()
        request = engine.add(prompt, params)
        finish(engine, request)
        expected.append(request)
    engine = engine_of()
    for order in (range(len(prompts)), reversed(range(len(prompts)))):
        requests = {}
        for i in order:
            requests[i] = engine.add(prompts[i], params)
            engine.step()
        finish(engine, *requests.values())
        for i, request in requests.items():
            assert request.tokens == expected[i].tokens
            assert request.logprobs == expected[i].logprobs
            assert request.top_logprobs == expected[i].top_logprobs
    assert max(request.reused for request in requests.values()) >= 32  # prefixes are reused all the same


def test_batch_invariance_runs_fixed_shapes():
    model = small_model()
    shapes = []
    hidden, logits = model.hidden, model.logits
    engine = Engine(model, prefill_chunk=8, batch_invariant=True)
    model.hidden = lambda tokens, rows: shapes.append(len(tokens)) or hidden(tokens, rows)
    model.logits = lambda states: shapes.append(-len(states)) or logits(states)
    finish(engine, *(engine.add(prompt_of(n), SamplingParams(max_tokens=n)) for n in (12, 3)))
    assert shapes == [8, 3, -1, 4, -4, 4, -1] + [4, -4] * 11


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x + torch.arange(len(x))[:, None] * 1e-3,  # depends on the place in the batch
        lambda x: (x / x.abs().max() * 127).round() * x.abs().max() / 127,  # and on the company
    ],
    ids=["place", "company"],
)
def test_batch_invariance_is_refused_where_the_kernels_break_it(spoil):
    model = small_model()
    check_batch_invariance(model, 4)
    w2 = model.layers[0].feed_forward.w2
    forward = w2.forward
    w2.forward = lambda x: forward(spoil(x))
    with pytest.raises(ValueError, match="batch_invariant=True is not possible here: on cpu in float32"):
        Engine(model, batch_invariant=True)
