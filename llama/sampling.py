"""From logits to tokens: penalties, temperature, what is kept of the distribution, seeds, logprobs.

Every request is sampled by its own parameters, its own tokens and its own seed: the draw of its n-th
token is one uniform number that depends on the seed and n alone, looked up in the inverse of the
cumulative distribution of what is kept. So a request draws the same tokens whoever shares its batch,
after a restart, and on any number of ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama.device import to_device
from llama.errors import ArgumentError

# A nucleus is looked for among this many most likely tokens first: to sort a whole vocabulary of
# 128,256 costs 20 times as much. Where it does not fit, all are sorted.
NUCLEUS_SHORTCUT = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises ValueError where a number is out of its range.

    The order in which they apply: repetition_penalty, presence_penalty and frequency_penalty,
    logit_bias, temperature, top_k, top_p, min_p. Logprobs are of the raw logits, before all of them.

    temperature: divides the logits; 0 takes the most likely token.
    top_p: of the tokens sorted by probability, one is dropped when those before it sum to more.
    top_k: only so many most likely tokens are kept, and top_p is a share of theirs; None: all.
    min_p: tokens less likely than this share of the most likely one are dropped.
    repetition_penalty: divides positive and multiplies negative logits of all tokens of prompt and
    answer (Keskar et al. 2019, section 4.1); 1 changes nothing.
    presence_penalty: subtracted from the logit of each token in the answer so far.
    frequency_penalty: subtracted as often as the token is in the answer so far.
    logit_bias: added to the logits of these token ids; -inf forbids one.
    seed: of the request's own draws, any integer.
    max_tokens: at most so many new tokens; None: as many as the context has room for.
    logprobs: log-probabilities of the tokens generated. prompt_logprobs: of the prompt's tokens too;
    the first one's is 0.
    top_logprobs: with them, the ids and log-probabilities of so many most likely tokens.
    stop_token_ids: end the answer, and are not part of it.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    max_tokens: int | None = None
    logprobs: bool = False
    prompt_logprobs: bool = False
    top_logprobs: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        def check(name: str, kind: str, fits: bool) -> None:
            if not fits:
                raise ArgumentError(f"{name} must be {kind}, not {getattr(self, name)!r}")

        check("temperature", "0 (greedy) or more", _number(self.temperature, 0))
        check("top_p", "a number from 0 to 1", _number(self.top_p, 0, 1))
        check("top_k", "a whole number, 1 or more, or None", self.top_k is None or _whole(self.top_k, 1))
        check("min_p", "a number from 0 to 1", _number(self.min_p, 0, 1))
        check(
            "repetition_penalty",
            "more than 0 (1 changes nothing)",
            _number(self.repetition_penalty, 0) and self.repetition_penalty > 0,
        )
        check("presence_penalty", "a finite number", _number(self.presence_penalty))
        check("frequency_penalty", "a finite number", _number(self.frequency_penalty))
        check(
            "logit_bias",
            "a table of token ids and finite numbers or -inf",
            isinstance(self.logit_bias, Mapping)
            and all(
                _whole(token, 0) and (_number(bias) or bias == -math.inf)
                for token, bias in self.logit_bias.items()
            ),
        )
        check("seed", "a whole number", _whole(self.seed))
        check(
            "max_tokens",
            "a whole number, 0 or more, or None",
            self.max_tokens is None or _whole(self.max_tokens, 0),
        )
        check("top_logprobs", "a whole number, 0 or more", _whole(self.top_logprobs, 0))
        if self.top_logprobs and not self.logprobs:
            raise ArgumentError(f"top_logprobs={self.top_logprobs} needs logprobs=True")

    @property
    def adjusts(self) -> bool:
        """Whether the logits change before the temperature does."""
        return bool(
            self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        )


def _number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and low <= value <= high


def _whole(value: object, low: float = -math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def uniform(seed: int, n: int) -> float:
    """The n-th number in [0, 1) of the sequence that `seed` names, by splitmix64 (Steele et al. 2014)."""
    return (_mix(_mix(seed) + (n + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x &= (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return x ^ (x >> 31)


def derive_seed(seed: int, n: int) -> int:
    """The seed of the n-th request of a program whose own seed is `seed`."""
    return _mix(_mix(seed + 0x94D049BB133111EB) + n)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) under fp32 logits (N, vocab_size), for int64 tokens (N). Returns fp32 (N)."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def top_logprobs(logits: Tensor, n: int) -> list[list[tuple[int, float]]]:
    """For each row of fp32 logits (N, vocab_size) the n most likely ids with log p, best first."""
    top, ids = logits.topk(min(n, logits.shape[-1]), -1)
    logprobs = top - logits.logsumexp(-1, keepdim=True)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), logprobs.tolist(), strict=True)]


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """The next token of each row: int64 (N) from fp32 logits (N, vocab_size), which stay as they are.

    params: each row's own. prompts, answers: the ids that each row's request was given and has drawn.
    """
    if adjusted := [i for i, p in enumerate(params) if p.adjusts]:
        logits = logits.clone()
        for i in adjusted:
            adjust(logits[i], params[i], prompts[i], answers[i])
    tokens = logits.argmax(-1)
    if sampled := [i for i, p in enumerate(params) if p.temperature > 0]:
        drawn = [params[i] for i in sampled]
        numbers = settings(drawn, [len(answers[i]) for i in sampled], logits.shape[-1], logits.device)
        rows = slice(None) if len(sampled) == len(params) else to_device(sampled, logits.device)
        tokens[rows] = draw(logits[rows], numbers)
    return tokens


def settings(
    params: Sequence[SamplingParams], counts: Sequence[int], vocab_size: int, device: torch.device
) -> Tensor:
    """What `draw` wants to know of each row, which has so many tokens already: fp32 (5, N, 1).

    In order: temperature, top_p, top_k, min_p, and the row's uniform number.
    """
    columns = [
        # A temperature below 1e-30 might be 0 in fp32.
        (max(p.temperature, 1e-30), p.top_p, p.top_k or vocab_size, p.min_p, uniform(p.seed, n))
        for p, n in zip(params, counts, strict=True)
    ]
    return to_device(columns, device, torch.float32).T[..., None]


def adjust(logits: Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Apply a request's penalties and bias to its own logits, fp32 (vocab_size), in place."""
    if params.repetition_penalty != 1:
        ids = torch.tensor([*prompt, *answer], device=logits.device)
        seen = logits[ids]
        logits[ids] = torch.where(
            seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty
        )
    if answer and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(answer, device=logits.device)
        logits[ids] = logits[ids] - params.presence_penalty  # once, however often an id is there
        logits.index_add_(0, ids, logits.new_full(ids.shape, -params.frequency_penalty))
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)


def draw(logits: Tensor, settings: Tensor) -> Tensor:
    """Draw what stands at the point u of the cumulative sum of the tokens kept, most likely first.

    Kept is the nucleus (Holtzman et al. 2020, section 3.1) of the top_k (Fan et al. 2018, section
    5.4), less what min_p drops (Nguyen et al. 2024, section 3).
    logits: fp32 (N, vocab_size). settings: see there. Returns int64 (N).
    """
    tokens, larger = draw_among(logits, settings, NUCLEUS_SHORTCUT)
    if larger.any():
        tokens[larger] = draw_among(logits[larger], settings[:, larger], logits.shape[-1])[0]
    return tokens


def draw_among(logits: Tensor, settings: Tensor, look: int) -> tuple[Tensor, Tensor]:
    """`draw` among the `look` most likely tokens, and for which rows (bool, N) more are kept than those."""
    temperature, top_p, top_k, min_p, u = settings
    top, ids = logits.topk(min(look, logits.shape[-1]), -1)
    best = top[:, :1]
    # Relative to the best, so that no temperature is too low.
    probs = ((top - best) / temperature - ((logits - best) / temperature).logsumexp(-1, keepdim=True)).exp()
    before = probs.cumsum(-1) - probs
    beyond = torch.arange(top.shape[-1], device=logits.device) >= top_k
    limited = top_k < logits.shape[-1]
    share = top_p * probs.masked_fill(beyond, 0).sum(-1, keepdim=True).where(limited, 1.0)
    dropped = (before > share) | beyond | (probs < min_p * probs[:, :1])
    kept = probs.masked_fill(dropped, 0).cumsum(-1)
    chosen = torch.searchsorted(kept, u * kept[:, -1:]).clamp(max=ids.shape[-1] - 1)  # clamp: for NaN
    larger = ~(dropped[:, -1] | (before[:, -1] + probs[:, -1] > share[:, 0]))
    larger |= (limited & (top_k > look))[:, 0]  # the sum of their top_k is not known
    return ids.gather(-1, chosen)[:, 0], larger & (top.shape[-1] < logits.shape[-1])
