"""Many requests that join, leave and are cancelled at random, against what each gets alone.

In fp32 ids must be equal although sums add up in another order at every shape. The weights are large
(std 0.5), so that logits lie far apart, and draws are from few tokens: a choice that rounding could
turn around then has a chance of less than one in a hundred over the whole test.
"""

import gc
import json
import random
import sys
import weakref
from pathlib import Path

import pytest
import torch

from llama import Llama, sampling
from llama.engine import Engine, Request
from llama.sampling import SamplingParams
from tests.support.tiny import byte_tokenizer, save_model, small_model

BROKEN = 13  # a token whose embedding is damaged


def soak_model(slots: int, **changes):
    return damaged(small_model(std=0.5, max_batch_size=slots, **changes))


def damaged(model):
    """A file with such an embedding would be refused."""
    embeddings = model.tok_embeddings
    if embeddings.start <= BROKEN < embeddings.stop:
        embeddings.weight[BROKEN - embeddings.start] = torch.nan
    return model


def random_request(generator: random.Random) -> tuple[list[int], SamplingParams]:
    beginning = [generator.randrange(14, 20)] * generator.choice((0, 3, 9, 20))  # shared with others
    rest = [generator.randrange(64) for _ in range(generator.randint(1, 30))]
    if generator.random() < 0.95:
        rest = [token for token in rest if token != BROKEN] or [1]
    params = SamplingParams(
        temperature=generator.choice((0, 0, 0.3, 0.7)),
        top_k=generator.choice((2, 5)),
        top_p=generator.choice((0.9, 1.0)),
        min_p=generator.choice((0, 0.05)),
        repetition_penalty=generator.choice((1, 1, 1.2)),
        presence_penalty=generator.choice((0, 0, 0.5)),
        frequency_penalty=generator.choice((0, 0, 0.3)),
        logit_bias=generator.choice(({}, {}, {5: 1.0, 6: -2.0})),
        seed=generator.randrange(1000),
        max_tokens=generator.choice((0, 1, 3, 8, 14)),
        logprobs=generator.random() < 0.5,
        prompt_logprobs=generator.random() < 0.1,
        stop_token_ids=frozenset(generator.sample(range(64), 3)),
    )
    return beginning + rest, params


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> Request:
    request = engine.add(prompt, params)
    for _ in engine.run([request]):
        pass
    return request


def soak(engine: Engine, count: int, seed: int, check) -> dict[str, int]:
    """Put `count` random requests through an engine; give each that has ended to `check`."""
    generator = random.Random(seed)
    live: list[Request] = []
    outcomes = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
    added = 0
    while added < count or engine.has_work():
        for _ in range(generator.choice((0, 0, 1, 2, 5)) if len(live) < 20 else 0):
            if added < count:
                live.append(engine.add(*random_request(generator)))
                added += 1
        if live and generator.random() < 0.1:
            engine.cancel(generator.choice(live))
        engine.step()
        assert all(slot.request is None or slot.request.slot == slot.index for slot in engine.slots.all)
        for request in [request for request in live if request.finish_reason]:
            live.remove(request)
            outcomes[request.finish_reason] += 1
            check(request)
    assert not live
    assert not engine.slots.running()
    assert not engine.waiting
    return outcomes


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("static", [False, True], ids=["ragged", "static"])
@pytest.mark.parametrize(
    "count", [pytest.param(400, marks=pytest.mark.slow), pytest.param(1200, marks=pytest.mark.soak)]
)
def test_hundreds_of_requests_over_eight_slots(static, count, monkeypatch):
    single = Engine(soak_model(1), prefill_chunk=64)
    engine = Engine(soak_model(8), prefill_chunk=7, static=static)
    if static:
        monkeypatch.setattr(sampling, "NUCLEUS_SHORTCUT", 3)  # so that it is left now and then
    reused, requests, memory = 0, [], []

    def check(request: Request) -> None:
        nonlocal reused
        expected = alone(single, request.prompt, request.params)
        reused += request.reused
        requests.append(weakref.ref(request))
        if len(requests) in (count // 3, count):
            gc.collect()
            memory.append(resident())
        if request.finish_reason == "cancelled":
            assert request.tokens == expected.tokens[: len(request.tokens)]
            return
        assert (request.tokens, request.finish_reason) == (expected.tokens, expected.finish_reason)
        if request.finish_reason == "error":
            return  # what is broken is broken in more places of a longer chunk
        for mine, other in (
            (request.logprobs, expected.logprobs),
            (request.prompt_logprobs, expected.prompt_logprobs),
        ):
            torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)

    outcomes = soak(engine, count, seed=1, check=check)
    assert sum(outcomes.values()) == count
    assert min(outcomes.values()) >= count / 60, outcomes  # all kinds of ends were there
    assert reused > count
    gc.collect()
    assert not any(ref() for ref in requests)  # nobody holds what has ended
    assert memory[1] - memory[0] < 4_000_000


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_soak_is_bitwise(dtype):
    single = Engine(soak_model(8, dtype=dtype), prefill_chunk=8, batch_invariant=True)
    engine = Engine(soak_model(8, dtype=dtype), prefill_chunk=8, batch_invariant=True)

    def check(request: Request) -> None:
        expected = alone(single, request.prompt, request.params)
        n = len(request.tokens) if request.finish_reason == "cancelled" else None
        assert request.tokens == expected.tokens[:n]
        assert request.logprobs == expected.logprobs[:n]
        if request.finish_reason in ("stop", "length"):
            assert request.prompt_logprobs == expected.prompt_logprobs

    soak(engine, 80, seed=2, check=check)


@pytest.mark.slow
def test_two_ranks(tmp_path, on_ranks):
    tokenizer = byte_tokenizer(tmp_path)
    save_model(tmp_path, small_model(std=0.5, max_batch_size=1, vocab_size=tokenizer.n_words))
    single = Engine(soak_model(1, vocab_size=tokenizer.n_words))
    expected = []

    def check(request: Request) -> None:
        answer = alone(single, request.prompt, request.params)
        expected.append([request.prompt, answer.tokens, answer.finish_reason])

    engine = Engine(soak_model(4, vocab_size=tokenizer.n_words), prefill_chunk=7)
    soak(engine, 80, seed=3, check=check)
    result = on_ranks(2, "-m", __name__, tmp_path)
    assert result.returncode == 0, result.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    for (prompt, tokens, reason), answer in zip(found[0], expected, strict=True):
        assert prompt == answer[0]
        if reason == "cancelled":
            assert tokens == answer[1][: len(tokens)]
        else:
            assert [tokens, reason] == answer[1:]


def one_rank(folder: Path) -> None:
    """The same soak on this rank's part of the model."""
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=4, device="cpu", dtype="float32")
    with llama:
        results = []
        engine = Engine(damaged(llama.model), prefill_chunk=7)
        soak(engine, 80, 3, lambda r: results.append([r.prompt, r.tokens, r.finish_reason]))
        (folder / f"rank{llama.model.parallel.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
