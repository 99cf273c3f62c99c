"""`Llama`: what it generates, what it returns, what it refuses, and what it leaves alone."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llama import Llama, Tokenizer
from llama.errors import CheckpointError
from llama.sampling import SamplingParams
from tests.support import tiny
from tests.support.formats import hf_model

PROMPTS = [[256, 3, 100], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [99, 98, 97, 96, 95, 94]]


@pytest.fixture
def llama(ckpt: Path) -> Llama:
    return Llama.build(ckpt, max_seq_len=64, max_batch_size=4, dtype="float32")


def greedy(llama: Llama, prompt: list[int], count: int) -> list[int]:
    """The plainest loop there is: the whole sequence anew for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(llama.model(torch.tensor([tokens]), 0)[0, -1].argmax()))
    return tokens[len(prompt) :]


def raw_logprobs(llama: Llama, tokens: list[int]) -> list[float]:
    """Of each token but the first, given those before it, in one pass."""
    scores = llama.model(torch.tensor([tokens]), 0)[0].log_softmax(-1)
    return scores[range(len(tokens) - 1), tokens[1:]].tolist()


class Watch:
    """Counts what is asked of a model: rows of each step, and positions projected to the vocabulary."""

    def __init__(self, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[int]] = []
        self.projected = 0
        hidden, logits = llama.model.hidden, llama.model.logits

        def watched_hidden(tokens, rows):
            self.steps.append([row.length for row in rows])
            return hidden(tokens, rows)

        def watched_logits(states):
            self.projected += len(states)
            return logits(states)

        monkeypatch.setattr(llama.model, "hidden", watched_hidden)
        monkeypatch.setattr(llama.model, "logits", watched_logits)


def test_greedy_equals_the_plainest_loop(llama: Llama) -> None:
    expected = [greedy(llama, prompt, 12) for prompt in PROMPTS]
    assert llama.generate(PROMPTS, 12, temperature=0) == (expected, None)


def test_mixed_lengths_take_one_prefill_pass(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(llama, monkeypatch)
    llama.generate(PROMPTS, 12, temperature=0)
    assert watch.steps == [[3, 10, 6]] + 11 * [[1, 1, 1]]
    assert watch.projected == 12 * 3  # one position per new token, never the prompt's


def test_finished_rows_cost_nothing(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = greedy(llama, PROMPTS[0], 3)[2]
    monkeypatch.setattr(llama.tokenizer, "stop_tokens", [ends])
    watch = Watch(llama, monkeypatch)
    tokens, _ = llama.generate(PROMPTS, 12, temperature=0)
    assert len(tokens[0]) == 2
    assert watch.steps[3:] == [[1] * sum(len(t) > i for t in tokens) for i in range(3, len(watch.steps))]
    assert len(watch.steps[3]) < 3


def test_the_stop_token_is_left_out(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy(llama, PROMPTS[1], 8)
    stop = next(t for i, t in enumerate(expected) if i > 2 and t not in expected[:i])
    monkeypatch.setattr(llama.tokenizer, "stop_tokens", [stop])
    tokens, logprobs = llama.generate([PROMPTS[1]], 8, temperature=0, logprobs=True)
    assert tokens == [expected[: expected.index(stop)]]
    assert logprobs is not None
    assert len(logprobs[0]) == len(tokens[0])


def test_echo_is_not_cut_at_a_stop_token_in_the_prompt(llama: Llama) -> None:
    prompt = [5, llama.tokenizer.stop_tokens[0], 6, 7]
    tokens, logprobs = llama.generate([prompt], 4, temperature=0, logprobs=True, echo=True)
    assert tokens[0][:4] == prompt
    assert len(tokens[0]) > 4
    assert logprobs is not None
    assert len(logprobs[0]) == len(tokens[0])


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_logprobs_are_of_the_raw_logits(llama: Llama, temperature: float) -> None:
    tokens, logprobs = llama.generate(PROMPTS, 10, temperature, 0.5, logprobs=True, echo=True)
    assert logprobs is not None
    for sequence, scores in zip(tokens, logprobs, strict=True):
        assert scores == pytest.approx([0, *raw_logprobs(llama, sequence)], abs=1e-4)
    alone, scores = llama.generate([tokens[0]], 5, temperature=0, logprobs=True)
    assert scores is not None
    assert scores[0] == pytest.approx(raw_logprobs(llama, tokens[0] + alone[0])[-len(alone[0]) :], abs=1e-4)


def test_a_prompt_that_fills_the_context_can_be_scored(llama: Llama) -> None:
    prompt = torch.randint(0, 256, (64,)).tolist()
    for batch in ([prompt], [prompt, prompt[:9]]):
        tokens, logprobs = llama.generate(batch, 0, logprobs=True, echo=True)
        assert tokens == batch
        assert logprobs is not None
        assert logprobs[0] == pytest.approx([0, *raw_logprobs(llama, prompt)], abs=1e-4)


def test_scoring_a_long_prompt_projects_it_in_pieces(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole prompt's logits at once would take gigabytes with a real vocabulary."""
    prompt = torch.randint(0, 256, (50,)).tolist()
    expected = llama.generate([prompt], 0, logprobs=True, echo=True)
    monkeypatch.setattr("llama.engine.outcomes.LOGPROB_ROWS", 7)
    llama.engine.prefill_chunk = 15
    again = llama.generate([prompt], 0, logprobs=True, echo=True)
    assert again[1] == [pytest.approx(expected[1][0], abs=1e-4)]  # type: ignore[index]


def test_a_seed_gives_the_same_tokens_alone_in_any_batch_and_in_any_order(llama: Llama) -> None:
    alone = [llama.generate([prompt], 20, 1.0, 0.95, seed=7)[0][0] for prompt in PROMPTS]
    assert llama.generate(PROMPTS, 20, 1.0, 0.95, seed=7)[0] == alone
    assert llama.generate(PROMPTS[::-1], 20, 1.0, 0.95, seed=7)[0] == alone[::-1]
    assert llama.generate(3 * PROMPTS, 20, 1.0, 0.95, seed=7)[0] == 3 * alone
    assert llama.generate(PROMPTS, 20, 1.0, 0.95, seed=8)[0] != alone


@pytest.mark.slow
def test_builds_seed_makes_a_program_repeat_itself(ckpt: Path) -> None:
    def run(seed: int) -> list[list[list[int]]]:
        with Llama.build(ckpt, None, 32, 2, seed=seed) as llama:
            return [llama.generate([[1, 2]] * 3, 20, temperature=1.0)[0] for _ in range(2)]

    first = run(1)
    assert first == run(1)
    assert first != run(2)
    assert first[0] != first[1]  # the calls of a program differ, and so do equal prompts of one call
    assert first[0][0] != first[0][1]


def test_calls_of_the_model_itself_do_not_disturb(llama: Llama) -> None:
    """Neither what a slot is thought to hold for the next request, nor a request that is under way."""
    expected = greedy(llama, PROMPTS[1], 8)
    assert llama.generate([PROMPTS[1]], 8, temperature=0)[0] == [expected]
    llama.model(torch.zeros(4, 30, dtype=torch.int64), 0)
    assert llama.generate([PROMPTS[1]], 8, temperature=0)[0] == [expected]
    request = llama.engine.add(PROMPTS[1], SamplingParams(temperature=0, max_tokens=8))
    for _ in llama.engine.run([request]):
        llama.model(torch.zeros(4, 30, dtype=torch.int64), 0)
    assert request.tokens == expected


def test_more_prompts_than_slots_are_worked_off_in_order(llama: Llama) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(11)]
    tokens, _ = llama.generate(prompts, 6, temperature=0)
    assert tokens == [greedy(llama, prompt, 6) for prompt in prompts]


def test_a_prompt_that_leaves_little_room_gets_what_fits(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.tokenizer, "stop_tokens", [])
    tokens, _ = llama.generate([[1] * 60, [1] * 5], 10, temperature=0)
    assert [len(t) for t in tokens] == [4, 10]
    assert [len(t) for t in llama.generate([[1] * 60], None, temperature=0)[0]] == [4]


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1: the prompt is empty"),
        ([[1], [2] * 64], "prompt 1: the prompt has 64 tokens, which leaves no room .* max_seq_len=64"),
        ([[1, tiny.VOCAB]], f"prompt 0: {tiny.VOCAB} is not a token id"),
        ([[-1]], "prompt 0: -1 is not a token id"),
        ([["a"]], "prompt 0: 'a' is not a token id"),
    ],
)
def test_impossible_prompts_are_refused_and_cost_nothing(llama: Llama, prompts: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        llama.generate(prompts, 4)
    assert not llama.engine.has_work()
    assert llama.generate([[1, 2]], 4)[0]


@pytest.mark.parametrize(
    "arguments",
    [{"temperature": -1}, {"temperature": math.nan}, {"top_p": 1.5}, {"top_p": -0.1}, {"max_gen_len": -1}],
)
def test_parameters_out_of_range_are_named(llama: Llama, arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        llama.generate([[1]], **arguments)


def test_a_damaged_model_is_found_out(llama: Llama) -> None:
    llama.model.norm.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"prompt 0: the model's logits are not finite"):
        llama.generate([[1, 2]], 4)
    assert not llama.engine.has_work()


def test_an_interrupted_call_frees_its_slots(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = llama.model.hidden

    def interrupt(*args):
        hidden(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(llama.model, "hidden", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama.generate(3 * PROMPTS, 8)
    monkeypatch.undo()
    assert not llama.engine.has_work()
    assert llama.generate(PROMPTS, 8, temperature=0)[0] == [greedy(llama, p, 8) for p in PROMPTS]


def test_text_completion_returns_text(llama: Llama) -> None:
    plain = llama.text_completion(["the llama", "in"], temperature=0, max_gen_len=5)
    assert [set(p) for p in plain] == [{"generation", "finish_reason"}] * 2
    scored = llama.text_completion(["the llama", "in"], temperature=0, max_gen_len=5, logprobs=True)
    assert [p["generation"] for p in scored] == [p["generation"] for p in plain]
    assert all(len(p["tokens"]) == len(p["logprobs"]) <= 5 for p in scored)
    echoed = llama.text_completion(["the llama"], temperature=0, max_gen_len=5, echo=True)
    assert echoed[0]["generation"] == "<|begin_of_text|>the llama" + plain[0]["generation"]


def test_chat_completion_returns_messages(llama: Llama) -> None:
    dialogs = [[{"role": "user", "content": "the llama"}], [{"role": "user", "content": "an"}]]
    plain = llama.chat_completion(dialogs, temperature=0, max_gen_len=5)
    assert [set(p) for p in plain] == [{"generation", "finish_reason"}] * 2
    assert all(p["generation"]["role"] == "assistant" for p in plain)
    scored = llama.chat_completion(dialogs, temperature=0, max_gen_len=5, logprobs=True)
    assert [p["generation"] for p in scored] == [p["generation"] for p in plain]
    assert all(len(p["tokens"]) == len(p["logprobs"]) for p in scored)


def test_one_where_a_list_belongs_is_refused(llama: Llama) -> None:
    with pytest.raises(ValueError, match="prompts must be a list"):
        llama.text_completion("hello")
    with pytest.raises(ValueError, match="a dialog must be a list of messages, not dict"):
        llama.chat_completion([{"role": "user", "content": "x"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="unknown role 'bot'"):
        llama.chat_completion([[{"role": "bot", "content": "x"}]])  # type: ignore[typeddict-item]


@pytest.fixture
def untouched() -> Iterator[None]:
    """Everything global that the reference changed, or that is easily changed."""

    def state() -> tuple:
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            sys.stdout,
            torch.random.get_rng_state().tolist(),
            dist.is_initialized(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
        )

    before = state()
    yield
    assert state() == before


@pytest.mark.usefixtures("untouched")
def test_building_and_generating_change_nothing_global(ckpt: Path) -> None:
    with Llama.build(ckpt, max_seq_len=32, max_batch_size=1, dtype="bfloat16", seed=3) as llama:
        llama.generate([[1, 2, 3]], 8, temperature=1.0)


def test_two_models_live_in_one_process(tmp_path: Path, llama: Llama) -> None:
    expected = llama.generate(PROMPTS, 8, temperature=0)
    other = tiny.write_checkpoint(tmp_path / "other", seed=1, n_layers=2, n_heads=4)
    with Llama.build(other, max_seq_len=32, max_batch_size=1, dtype="float32") as second:
        assert second.generate(PROMPTS, 8, temperature=0) != expected
        assert llama.generate(PROMPTS, 8, temperature=0) == expected
    assert llama.generate(PROMPTS, 8, temperature=0) == expected


def test_a_llama_can_be_made_of_a_model_and_a_tokenizer(ckpt: Path) -> None:
    llama = Llama(tiny.random_model(), Tokenizer(str(ckpt / "tokenizer.model")))
    assert llama.generate([[1, 2]], 4, temperature=0)[0] == [greedy(llama, [1, 2], 4)]


def test_build_says_what_it_loaded_and_how_large_the_cache_is(
    ckpt: Path, capsys: pytest.CaptureFixture
) -> None:
    Llama.build(str(ckpt), str(ckpt / "tokenizer.model"), 64, 4, dtype="bfloat16")
    out, err = capsys.readouterr()
    assert out == ""
    # 3 layers × (k and v) × 4 sequences × 4 heads × 64 tokens × 8 channels × 2 bytes
    assert "Loaded tiny: 1 file" in err
    assert "bfloat16 on cpu" in err
    assert "KV cache: 0.1 MB for max_batch_size=4, max_seq_len=64" in err


def test_a_cache_that_cannot_fit_is_refused_with_its_size(ckpt: Path) -> None:
    with pytest.raises(
        MemoryError,
        match=r"KV cache of \d.* GB \(max_batch_size=4, max_seq_len=1000000000\).* lower max_seq_len",
    ):
        Llama.build(ckpt, max_seq_len=10**9, max_batch_size=4)


def test_contexts_may_be_longer_than_8192(ckpt: Path) -> None:
    assert Llama.build(ckpt, max_seq_len=20_000, max_batch_size=1).model.params.max_seq_len == 20_000


def test_arguments_of_build_that_cannot_be(ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or float32, not 'int3'"):
        Llama.build(ckpt, dtype="int3")
    with pytest.raises(ValueError, match=r"model_parallel_size=2 needs that many processes: .*torchrun"):
        Llama.build(ckpt, model_parallel_size=2)
    with pytest.raises(ValueError, match="max_seq_len must be a whole number, 1 or more, not 0"):
        Llama.build(ckpt, max_seq_len=0)
    other = tmp_path / "tokenizer.model"
    other.write_bytes(b"YQ== 0\n")
    with pytest.raises(CheckpointError, match="the tokenizer has 257 tokens"):
        Llama.build(ckpt, other)


@pytest.mark.slow
def test_greedy_answers_of_the_demo_model_equal_transformers(demo_ckpt: Path) -> None:
    """In fp32, ids and all; the two agree on what the capital of France is."""
    llama = Llama.build(demo_ckpt, max_seq_len=256, max_batch_size=4, dtype="float32")
    plain = Llama.build(demo_ckpt, dtype="float32", whole_steps=False)  # packed weights have no state dict
    oracle = hf_model(plain.model, tied=True)
    dialogs = [
        [{"role": "user", "content": text}]
        for text in (
            "What is the capital of France?",
            "Write a haiku about llamas.",
            "Count from one to ten. 🦙",
        )
    ]
    prompts = [llama.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
    answers, _ = llama.generate(prompts, 48, temperature=0)
    stops = llama.tokenizer.stop_tokens
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = oracle.generate(
            torch.tensor([prompt]),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )[0, len(prompt) :].tolist()
        assert answer == [token for token in ids if token not in stops]
    assert llama.tokenizer.decode(answers[0]) == "The capital of France is Paris."


def test_devices_are_asked_as_often_for_four_rows_as_for_one(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer that Python waits for stops a GPU's queue: some a step, none for each row of it."""
    asked = 0
    for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, original=original):
            nonlocal asked
            asked += 1
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def count(prompts: list[list[int]]) -> int:
        nonlocal asked
        asked = 0
        llama.generate(prompts, 6, temperature=0.7, logprobs=True, stop_token_ids=[])
        return asked

    monkeypatch.setattr(llama.tokenizer, "stop_tokens", [])
    assert count([[1, 2, 3]]) == count([[1, 2, 3], [5], [7, 8], [9, 9]]) <= 6 * 3
