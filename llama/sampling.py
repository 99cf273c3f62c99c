"""From logits to tokens: temperature, nucleus, seeds, logprobs.

Every request is sampled by its own parameters and its own seed: the draw of its n-th token is one
uniform number that depends on the seed and n alone, looked up in the inverse of the cumulative
distribution of what the nucleus keeps. So a request draws the same tokens whoever shares its batch,
after a restart, and on any number of ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A nucleus is looked for among this many most likely tokens first: to sort a whole vocabulary of
# 128,256 costs 20 times as much. Where it does not fit, all are sorted.
NUCLEUS_SHORTCUT = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises ValueError where a number is out of its range.

    temperature: divides the logits before anything else; 0 takes the most likely token.
    top_p: of the tokens sorted by probability, one is dropped when those before it sum to more.
    seed: of the request's own draws, any integer.
    max_tokens: at most so many new tokens; None: as many as the context has room for.
    logprobs: log-probabilities, by the raw logits, of the tokens generated.
    prompt_logprobs: of the prompt's tokens too; the first one's is 0.
    stop_token_ids: end the answer, and are not part of it.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    seed: int = 0
    max_tokens: int | None = None
    logprobs: bool = False
    prompt_logprobs: bool = False
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature!r}")
        if not (isinstance(self.top_p, int | float) and 0 <= self.top_p <= 1):
            raise ValueError(f"top_p must lie between 0 and 1, not {self.top_p!r}")
        if self.max_tokens is not None and not (isinstance(self.max_tokens, int) and self.max_tokens >= 0):
            raise ValueError(
                f"max_tokens must be a whole number, 0 or more, or None, not {self.max_tokens!r}"
            )


def uniform(seed: int, n: int) -> float:
    """The n-th number in [0, 1) of the sequence that `seed` names, by splitmix64 (Steele et al. 2014)."""
    return (_mix(_mix(seed) + n * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x &= (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return x ^ (x >> 31)


def derive_seed(seed: int, n: int) -> int:
    """The seed of the n-th request of a program whose own seed is `seed`."""
    return _mix(_mix(seed + 0x632BE59BD9B4E019) + n)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) under fp32 logits (N, vocab_size), for int64 tokens (N). Returns fp32 (N)."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def sample(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[int]) -> Tensor:
    """The next token of each row: int64 (N) from fp32 logits (N, vocab_size).

    params: each row's own. draws: how many tokens each row's request has drawn before.
    """
    tokens = logits.argmax(-1)
    sampled = [i for i, p in enumerate(params) if p.temperature > 0]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

        tokens[rows] = sample_nucleus(
            logits[rows] / column([params[i].temperature for i in sampled]),
            column([params[i].top_p for i in sampled]),
            column([uniform(params[i].seed, draws[i]) for i in sampled]),
        )
    return tokens


def sample_nucleus(logits: Tensor, top_p: Tensor, u: Tensor, k: int = NUCLEUS_SHORTCUT) -> Tensor:
    """Draw from the nucleus (Holtzman et al. 2020, section 3.1) at the point u of its cumulative sum.

    logits fp32 (N, vocab_size), already divided by the temperature; top_p and u fp32 (N, 1).
    Looks at the k most likely tokens, and at all for the rows whose nucleus is larger. Returns int64 (N).
    """
    top, ids = logits.topk(min(k, logits.shape[-1]), -1)
    probs = (top - logits.logsumexp(-1, keepdim=True)).exp()
    before = probs.cumsum(-1) - probs
    kept = probs.masked_fill(before > top_p, 0).cumsum(-1)
    chosen = torch.searchsorted(kept, u * kept[:, -1:]).clamp(max=ids.shape[-1] - 1)  # clamp: for NaN
    tokens = ids.gather(-1, chosen)[:, 0]
    larger = before[:, -1] + probs[:, -1] <= top_p[:, 0]
    if top.shape[-1] < logits.shape[-1] and larger.any():
        tokens[larger] = sample_nucleus(logits[larger], top_p[larger], u[larger], logits.shape[-1])
    return tokens
