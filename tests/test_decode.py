"""Decoding at fixed shapes says what the ragged steps say, one step ahead of who reads it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, sampling
from llama.backends.onednn import can_pack
from llama.engine import Engine
from llama.engine import static as decode
from llama.engine.request import Request, Work
from llama.engine.static import StaticRunner, check_compile
from llama.model import Row, Transformer
from llama.sampling import SamplingParams
from tests.support.engines import finish, prompt_of
from tests.support.quantized import KEPT, PACKED, reloaded
from tests.support.tiny import byte_tokenizer, save_model, small_model


def flexible(self: StaticRunner, model: Transformer, init: Any = StaticRunner.__init__) -> None:
    """A runner that uses flex attention on a CPU too, to see it run."""
    init(self, model)
    self.flex = True


class Launches:
    """The shapes of every static step of an engine: slots and positions looked at."""

    def __init__(self, engine: Engine) -> None:
        assert engine.static
        self.shapes: list[tuple[int, int]] = []
        run = engine.static.run

        def counting(tokens: torch.Tensor, positions: torch.Tensor, live: int) -> torch.Tensor:
            self.shapes.append((len(tokens), live))
            return run(tokens, positions, live)

        engine.static.run = counting  # type: ignore[method-assign]


CASES = [
    SamplingParams(temperature=0, max_tokens=9),
    SamplingParams(temperature=0.9, seed=3, max_tokens=20, logprobs=True),
    SamplingParams(temperature=0.8, top_p=0.7, seed=4, max_tokens=13),
    SamplingParams(temperature=1.0, top_k=7, min_p=0.02, seed=5, max_tokens=1),
    SamplingParams(temperature=1.2, seed=6, max_tokens=17, presence_penalty=0.5),
    SamplingParams(temperature=1.0, seed=7, max_tokens=15, logprobs=True, top_logprobs=2),
    SamplingParams(temperature=0, max_tokens=25, stop_token_ids=frozenset(range(0, 64, 5))),
]


@pytest.fixture(scope="module")
def alone() -> list[Request]:
    """`CASES` one after the other, by ragged steps."""
    ragged, requests = Engine(small_model(max_batch_size=1)), []
    for i, params in enumerate(CASES):
        requests.append(ragged.add(prompt_of(2 + 5 * i, seed=i), params))
        finish(ragged, requests[-1])
    return requests


@pytest.mark.parametrize("shortcut", [1024, 2], ids=["", "nuclei larger than the shortcut"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_static_is_ragged(
    alone: list[Request], slots: int, shortcut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = Engine(small_model(max_batch_size=slots), static=True)
    launches = Launches(static)
    monkeypatch.setattr(sampling, "NUCLEUS_SHORTCUT", shortcut)
    mine = [static.add(request.prompt, request.params) for request in alone]
    finish(static, *mine)
    for request, expected in zip(mine, alone, strict=True):
        assert (request.tokens, request.finish_reason) == (expected.tokens, expected.finish_reason)
        torch.testing.assert_close(request.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)
    assert len(launches.shapes) > 20
    assert {live for _, live in launches.shapes} == {64}
    assert not static.pending  # nobody holds the last step


def test_a_step_begins_before_the_last_ones_tokens_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small_model(max_batch_size=2), static=True)
    calls: list[str] = []
    run, wait = engine.static.run, decode.StaticPending.wait  # type: ignore[union-attr]
    monkeypatch.setattr(engine.static, "run", lambda *args: calls.append("run") or run(*args))
    monkeypatch.setattr(decode.StaticPending, "wait", lambda *args: calls.append("wait") or wait(*args))
    finish(engine, engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=6)))
    # The first token is the prompt's; the last is known to be the last.
    assert calls == ["run", *["run", "wait"] * 4, "wait"]


def test_who_leaves_in_mid_air_leaves_the_others_as_they_were() -> None:
    model = small_model(max_batch_size=3)
    engine = Engine(model, static=True)
    alone = Engine(small_model(max_batch_size=1))
    expected = alone.add([1, 2, 3], SamplingParams(temperature=0.9, seed=1, max_tokens=20))
    finish(alone, expected)
    stays = engine.add(expected.prompt, expected.params)
    leaves = engine.add([4, 5], SamplingParams(temperature=0, max_tokens=20))
    for _ in range(5):
        engine.step()
    engine.cancel(leaves)
    joins = engine.add([7, 8, 9, 10], SamplingParams(temperature=0, max_tokens=5))
    finish(engine, stays, joins)
    assert stays.tokens == expected.tokens
    again = alone.add(joins.prompt, joins.params)
    finish(alone, again)
    assert joins.tokens == again.tokens


def test_a_stale_row_that_is_not_finite_hurts_nobody() -> None:
    model = small_model(max_batch_size=1)
    model.tok_embeddings.weight[13] = torch.nan
    engine = Engine(model, static=True)
    params = SamplingParams(temperature=0, max_tokens=10)
    broken = engine.add([1] * 20 + [13] * 20, params)
    finish(engine, broken)
    assert broken.finish_reason == "error"
    request = engine.add([2, 3], params)
    finish(engine, request)
    assert request.finish_reason == "length"
    assert not model.cache.data.isnan().any()


def test_what_is_not_finite_is_not_copied_with_a_prefix() -> None:
    model = small_model(max_batch_size=2)
    model.tok_embeddings.weight[13] = torch.nan
    engine = Engine(model, static=True, prefill_chunk=8)
    params = SamplingParams(temperature=0, max_tokens=10)
    finish(engine, engine.add([1] * 9, SamplingParams(max_tokens=1)))
    broken = engine.add([1] * 9 + [13] * 20, params)  # continues
    engine.step()
    request = engine.add([1] * 9 + [2], params)  # begins with a copy
    finish(engine, broken, request)
    assert (broken.reused, broken.finish_reason) == (9, "error")
    assert (request.reused, request.finish_reason) == (9, "length")


def test_slots_without_a_token_keep_their_cache() -> None:
    model = small_model(max_batch_size=4)
    model.allocate_cache()
    model.cache.data.normal_(generator=torch.Generator().manual_seed(0))
    before = model.cache.data.clone()
    runner = StaticRunner(model)
    runner.logits(torch.tensor([1, 2, 3, 4]), torch.tensor([-1, 5, -1, 0]), 5)
    changed = (model.cache.data != before).any(-1).any(0).any(0).any(1)  # (max_batch_size, max_seq_len)
    assert changed.nonzero().tolist() == [[1, 5], [3, 0]]


def test_what_lies_beyond_a_position_is_not_seen() -> None:
    model = small_model(max_batch_size=2)
    model.allocate_cache()
    model.cache.data.normal_(generator=torch.Generator().manual_seed(0))
    runner = StaticRunner(model)
    inputs = torch.tensor([1, 2]), torch.tensor([30, 7]), 30
    before = runner.logits(*inputs)
    model.cache.data[:, :, 0, :, 31:] = 100
    model.cache.data[:, :, 1, :, 8:] = 100
    assert runner.logits(*inputs).equal(before)
    model.cache.data[:, :, 1, :, 6] = 100
    assert not runner.logits(*inputs).equal(before)


def test_a_start_waits_for_nothing() -> None:
    """On the meta device there are no values, so whatever wanted to read one would raise."""
    with torch.device("meta"):
        model: Transformer = small_model(max_batch_size=4)
    model.allocate_cache()
    runner = StaticRunner(model)
    requests = {
        0: Request([1, 2], SamplingParams(temperature=0.7, logprobs=True), 5, tokens=[3]),
        2: Request([1, 2], SamplingParams(temperature=0), 5, tokens=[3]),
    }
    first = runner.start([Work(request, Row(slot, 2, 1)) for slot, request in requests.items()], None)
    second = runner.start([Work(request, Row(slot, 3, 1)) for slot, request in requests.items()], first)
    assert isinstance(second, decode.StaticPending)
    assert second.tokens.shape == (4,)
    assert second.result.is_meta


def test_what_compile_may_be() -> None:
    cpu = torch.device("cpu")
    assert not check_compile("auto", cpu)
    assert check_compile(True, cpu)
    assert not check_compile(False, torch.device("cuda"))
    with pytest.raises(ValueError, match="not 'max'"):
        check_compile("max", cpu)


def test_batch_invariance_and_compile_exclude_each_other(ckpt: Path) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        Llama.build(ckpt, device="cpu", compile=True, batch_invariant=True)


def test_where_flex_attention_fails_the_plain_one_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel\nand a long report")

    monkeypatch.setattr(decode, "flex_attention", fails)
    engines = Engine(small_model(max_batch_size=2), static=True), Engine(small_model(max_batch_size=2))
    assert engines[0].static
    engines[0].static.flex = True
    requests = [engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=9)) for engine in engines]
    with pytest.warns(UserWarning, match="flex attention failed, decoding without it: no such kernel$"):
        finish(engines[0], requests[0])
    finish(engines[1], requests[1])
    assert requests[0].tokens == requests[1].tokens


@pytest.mark.slow
def test_compiled_is_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the compiled step is the one that CUDA captures, but for the capture."""
    tokenizer = byte_tokenizer(tmp_path)
    save_model(tmp_path, small_model(std=0.5, vocab_size=tokenizer.n_words))
    shape = {"max_seq_len": 200, "max_batch_size": 4, "device": "cpu", "dtype": "float32"}
    eager = Llama.build(tmp_path, compile=False, **shape)
    monkeypatch.setattr(StaticRunner, "__init__", flexible)
    compiled = Llama.build(tmp_path, compile=True, **shape)
    prompts = ["a", "some llamas", "x" * 150, "another", "and one more"]
    for arguments in ({"temperature": 0}, {"temperature": 0.7, "seed": 5, "top_p": 0.8}):
        answers = [
            llama.text_completion(prompts, max_gen_len=12, logprobs=True, **arguments)
            for llama in (eager, compiled)
        ]
        for one, other in zip(*answers, strict=True):
            assert one["tokens"] == other["tokens"]
            torch.testing.assert_close(one["logprobs"], other["logprobs"], atol=1e-4, rtol=1e-4)
    assert compiled.engine.static
    assert compiled.engine.static.flex  # nothing had to be left out


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["packed", "int8"])
def test_compiled_around_operators_that_the_compiler_does_not_know(scheme: str) -> None:
    """The graph breaks there, and what was written in place before must be there after."""
    model = small_model(std=0.3).bfloat16()
    if scheme == "packed" and not can_pack(model.device, model.dtype):
        pytest.skip("this CPU or build of PyTorch has no packed bf16")
    model = reloaded(model, PACKED) if scheme == "packed" else reloaded(model, KEPT, scheme)
    tokens = torch.randint(64, (2, 9))
    eager = model(tokens, 0)
    decode.compile_blocks(model)
    assert (model(tokens, 0) - eager).norm() < 0.05 * eager.norm()


@pytest.mark.slow
def test_two_ranks_compile_whole(tmp_path: Path, on_ranks) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    model = small_model(std=0.5, vocab_size=tokenizer.n_words, max_batch_size=4)
    save_model(tmp_path, model)
    result = on_ranks(2, "-m", __name__, tmp_path)
    assert result.returncode == 0, result.stderr
    answers = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert answers[0] == answers[1]
    generated, breaks = answers[0]
    # The only breaks in the graphs are the attention of ragged steps; the collectives are inside of them.
    assert breaks == [True]
    engine = Engine(model)
    for prompt, tokens in generated:
        request = engine.add(prompt, SamplingParams(temperature=0.5, seed=2, max_tokens=10))
        finish(engine, request)
        assert request.tokens == tokens


def one_rank(folder: Path) -> None:
    with Llama.build(
        folder, max_seq_len=64, max_batch_size=4, device="cpu", dtype="float32", compile=True
    ) as llama:
        prompts = [prompt_of(3 + 7 * i, seed=i) for i in range(4)]
        ids, _ = llama.generate(prompts, 10, temperature=0.5, top_p=0.9, seed=2)
        generated = list(zip(prompts, ids, strict=True))
        breaks = ["RaggedStep.attend" in why for why in torch._dynamo.utils.counters["graph_break"]]
        (folder / f"rank{llama.model.parallel.rank}.json").write_text(json.dumps([generated, breaks]))


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
