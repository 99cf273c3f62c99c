import math
from dataclasses import replace

import pytest
import torch

from llama import sampling
from llama.engine import Request
from llama.noise import gumbel
from llama.sampling import SamplingParams, adjust, choose, columns, token_logprobs, top_logprobs

VOCAB = 40


def logits_of(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(logits, params, prompts, answers) -> torch.Tensor:
    rows = zip(params, prompts, answers, strict=True)
    return sampling.sample(logits, [Request(prompt, p, 0, tokens=answer) for p, prompt, answer in rows])


def draws(logits: torch.Tensor, n: int, **params) -> torch.Tensor:
    """How often each token comes among n draws from one distribution, as shares of n.

    Half of them are draws of one request, the others are the first of many.
    """
    rows = [(SamplingParams(seed=max(0, i - n // 2), **params), min(i, n // 2)) for i in range(n)]
    tokens, again = choose(logits.expand(n, -1), columns(rows, logits.shape[-1], logits.device))
    assert not again.any()
    return torch.bincount(tokens, minlength=logits.shape[-1]) / n


def kept(logits: torch.Tensor, *, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """The distribution to draw from, by the definitions and one filter after the other."""
    probs = (logits[0].double() / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    if top_k:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    before = 0.0
    nucleus = torch.zeros_like(probs)
    for token in order:
        if before > top_p:
            break
        nucleus[token] = probs[token]
        before += probs[token].item()
    nucleus[nucleus < min_p * nucleus.max()] = 0
    return nucleus / nucleus.sum()


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"temperature": 0.5}, marks=pytest.mark.slow),
        pytest.param({"temperature": 2.0, "top_p": 0.7}, marks=pytest.mark.slow),
        pytest.param({"top_k": 3}, marks=pytest.mark.slow),
        pytest.param({"top_k": 10, "top_p": 0.6}, marks=pytest.mark.slow),
        pytest.param({"top_k": VOCAB + 5}, marks=pytest.mark.slow),
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
        pytest.param({"top_p": 0.8, "min_p": 0.05, "temperature": 2.5}, marks=pytest.mark.slow),
        pytest.param({"top_k": 25, "min_p": 0.02, "temperature": 0.8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_the_definition(params):
    logits, n = logits_of(), 20_000
    params = {"temperature": 1.0, "top_p": 1.0, **params}
    expected, seen = kept(logits, **params), draws(logits, n, **params)
    assert (seen[expected == 0] == 0).all()
    # Pearson's test. Its statistic has the mean of its degrees of freedom and a variance of twice as many.
    some = expected > 0
    statistic = (n * (seen[some] - expected[some]) ** 2 / expected[some]).sum()
    freedom = int(some.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params", [{"top_p": 1.0}, {"top_k": 30}, {"top_k": 30, "top_p": 0.95}, {"min_p": 0.01, "top_p": 1.0}]
)
def test_the_shortcut_for_small_nuclei_changes_nothing(params, monkeypatch):
    logits = logits_of(200, seed=1) / 2
    rows = [SamplingParams(temperature=1.0, seed=i, **params) for i in range(200)]
    whole = sample(logits, rows, [[1]] * 200, [[]] * 200)
    monkeypatch.setattr(sampling, "NUCLEUS_SHORTCUT", 8)  # look at 8 of 40 first
    assert sample(logits, rows, [[1]] * 200, [[]] * 200).equal(whole)


def test_greedy_is_argmax_and_top_p_0_too():
    logits = logits_of(5)
    for params in (SamplingParams(temperature=0), SamplingParams(top_p=0), SamplingParams(top_k=1)):
        assert sample(logits, [params] * 5, [[1]] * 5, [[]] * 5).equal(logits.argmax(-1))


def test_rows_do_not_touch_each_other():
    logits = logits_of(4)
    params = [
        SamplingParams(seed=1),
        SamplingParams(temperature=0),
        SamplingParams(seed=3, frequency_penalty=1.5, top_k=4),
        SamplingParams(seed=4, logit_bias={7: 3.0}, min_p=0.1),
    ]
    prompts, answers = [[1], [2], [3], [4]], [[5], [], [6, 6], [7]]
    together = sample(logits, params, prompts, answers)
    alone = [
        sample(logits[i : i + 1], params[i : i + 1], prompts[i : i + 1], answers[i : i + 1]) for i in range(4)
    ]
    assert together.tolist() == torch.cat(alone).tolist()


def test_a_draw_depends_on_seed_and_position_alone():
    logits = logits_of().expand(50, -1)
    params = [SamplingParams(temperature=2.0, top_p=1.0, seed=9)] * 50
    answers = [[0] * n for n in range(50)]
    first = sample(logits, params, [[1]] * 50, answers)
    torch.manual_seed(0)
    torch.rand(10)
    assert sample(logits, params, [[2, 3]] * 50, answers).equal(first)
    assert len(set(first.tolist())) > 5  # another position, another draw


def test_noise_has_its_distribution_and_is_fixed():
    keys = torch.tensor([[3], [-5], [2**62]])
    noise = gumbel(keys, torch.arange(5000))
    assert noise.dtype == torch.float64
    uniform = (-(-noise).exp()).exp()
    for row in uniform:
        counts = torch.histc(row, 20, 0, 1)
        assert ((counts - 250) ** 2 / 250).sum() < 19 + 5 * math.sqrt(38)
    assert torch.corrcoef(uniform).fill_diagonal_(0).abs().max() < 0.05
    # A seed keeps its meaning from release to release.
    assert gumbel(torch.tensor([1]), torch.tensor([2])).item() == pytest.approx(3.525877495744325, abs=1e-12)


def test_penalties_and_bias_by_hand():
    logits = torch.tensor([2.0, -1.0, 0.5, 4.0, 1.0])
    params = SamplingParams(
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        logit_bias={4: -1.5, 0: -math.inf},
    )
    adjust(logits, Request([0, 1], params, 0, tokens=[3, 3, 2]))
    expected = torch.tensor([-math.inf, -2.0, 0.25 - 0.25 - 0.5, 2.0 - 0.25 - 2 * 0.5, -0.5])
    assert logits.equal(expected - 0.75)  # relative to the largest


def test_penalties_leave_the_logits_of_others_and_the_raw_ones():
    logits = logits_of(2)
    before = logits.clone()
    params = [SamplingParams(temperature=0, logit_bias={3: 100.0}), SamplingParams(temperature=0)]
    tokens = sample(logits, params, [[1], [1]], [[], []])
    assert tokens.tolist() == [3, before[1].argmax().item()]
    assert logits.equal(before)


def test_a_strong_frequency_penalty_never_repeats():
    logits, answer = logits_of(), []
    params = SamplingParams(temperature=0, frequency_penalty=1000)
    for _ in range(VOCAB):
        answer += sample(logits, [params], [[1]], [answer]).tolist()
    assert sorted(answer) == list(range(VOCAB))


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-20, 1e-6, 1e30, 1e300])
def test_absurd_temperatures_still_draw_tokens_that_exist(temperature):
    logits = logits_of(20) * 1000
    token = sample(logits, [SamplingParams(temperature=temperature, top_p=1.0)] * 20, [[1]] * 20, [[]] * 20)
    assert (token < VOCAB).all()
    if temperature < 1:
        assert token.equal(logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0, 1.0, 1e300])
@pytest.mark.parametrize("options", [{}, {"top_p": 1.0}, {"top_k": 39}, {"min_p": 0.01}], ids=str)
def test_a_forbidden_token_is_never_drawn(temperature, options):
    """Whatever else is asked for, and however far other numbers push it."""
    logits = logits_of(300)
    allowed = [3, 8, 21]
    bias = {token: -math.inf for token in range(VOCAB) if token not in allowed}
    for penalties in ({}, {"presence_penalty": -1e9}, {"repetition_penalty": 1e-9}):
        params = [
            SamplingParams(temperature=temperature, seed=i, logit_bias=bias, **options, **penalties)
            for i in range(300)
        ]
        tokens = sample(logits, params, [[0, 1]] * 300, [[5, 8, 3]] * 300)
        assert set(tokens.tolist()) <= set(allowed)
        assert len(set(tokens.tolist())) > 1


def test_penalties_and_biases_of_any_size_keep_the_order_of_what_they_leave_alike():
    logits = logits_of()
    everything = list(range(VOCAB))
    order = logits[0].argsort(descending=True).tolist()
    for penalty in (-1e9, 1e9):
        for params in (
            SamplingParams(temperature=0, presence_penalty=penalty),
            SamplingParams(temperature=0, frequency_penalty=penalty),
            SamplingParams(temperature=0, logit_bias=dict.fromkeys(everything, penalty)),
        ):
            assert sample(logits, [params], [[1]], [everything]).item() == order[0]
    some = order[5:9]
    params = SamplingParams(temperature=0, logit_bias=dict.fromkeys(some, 1e6))
    assert sample(logits, [params], [[1]], [[]]).item() == some[0]


def test_no_token_at_all_is_said():
    nothing = SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -math.inf))
    for params in (nothing, replace(nothing, temperature=0)):
        assert sample(logits_of(), [params], [[1]], [[]]).tolist() == [sampling.FORBIDDEN]
    for broken in (math.nan, math.inf):
        logits = logits_of(2)
        logits[0, 7] = broken
        params = SamplingParams(logit_bias={7: -math.inf})
        assert sample(logits, [params] * 2, [[1]] * 2, [[]] * 2)[0] == sampling.BROKEN


def test_nothing_global_is_touched():
    state = torch.get_rng_state()
    draws(logits_of(), 10, temperature=1.0)
    assert torch.get_rng_state().equal(state)


def test_logprobs():
    logits = logits_of(3)
    expected = logits.log_softmax(-1)
    chosen = torch.tensor([1, 5, 7])
    torch.testing.assert_close(token_logprobs(logits, chosen), expected[range(3), chosen])
    for row, pairs in zip(expected, top_logprobs(logits, 4), strict=True):
        values, ids = row.topk(4)
        assert [token for token, _ in pairs] == ids.tolist()
        torch.testing.assert_close(torch.tensor([p for _, p in pairs]), values)
    assert len(top_logprobs(logits, 1000)[0]) == VOCAB


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 1.1),
        ("top_p", -1),
        ("top_k", 0),
        ("top_k", 2.5),
        ("min_p", 2),
        ("temperature", True),
        ("temperature", 10**309),
        ("top_p", False),
        ("min_p", True),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", True),
        ("presence_penalty", -1e90),
        ("presence_penalty", True),
        ("frequency_penalty", 1.1e9),
        ("logit_bias", {3: True}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {3: 1e39}),
        ("seed", True),
        ("seed", "1"),
        ("seed", None),
        ("logprobs", 1),
        ("prompt_logprobs", "yes"),
        ("stop_token_ids", frozenset({"a"})),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("frequency_penalty", None),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", [3]),
        ("seed", 1.5),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("top_logprobs", -1),
    ],
)
def test_absurd_parameters_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    assert repr(value) in str(caught.value)


def test_alternatives_need_logprobs():
    with pytest.raises(ValueError, match="needs logprobs=True"):
        SamplingParams(top_logprobs=3)
