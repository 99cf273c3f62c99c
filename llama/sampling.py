"""From logits to tokens: penalties, temperature, truncation of the distribution, seeds, logprobs.

Every request is sampled with its own parameters, tokens and seed. Draws use the Gumbel-max trick
(Maddison et al. 2014, section 2): pick the token with the largest logit / temperature + noise, where the
noise is a hash of seed, draw number and token id. A request therefore draws the same tokens in any batch,
after a restart and on any number of ranks; rounding can change a draw only if two sums nearly tie.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama.device import to_device
from llama.noise import gumbel, key_of
from llama.sampling_params import Draw
from llama.sampling_params import SamplingParams as SamplingParams

# Look for the nucleus among this many most likely tokens first: sorting a vocabulary of 128,256 costs
# 20 times as much. If the nucleus does not fit, all tokens are sorted.
NUCLEUS_SHORTCUT = 1024

BROKEN = -1  # in place of a token: the logits are not finite
FORBIDDEN = -2  # in place of a token: biases or a constraint allow none


class Constraint(Protocol):
    """Decides which tokens may come next in one request, for example by a grammar.

    Each call gets the whole answer so far, so an implementation may keep state and catch up.
    """

    def mask(self, answer: Sequence[int], logits: Tensor) -> None:
        """Set the logits, fp32 (vocab_size), of disallowed tokens to -inf, in place."""

    def forced(self, answer: Sequence[int]) -> Sequence[int]:
        """The tokens that must follow, whatever the logits; empty if the model has a choice."""

    def finished(self, answer: Sequence[int]) -> bool:
        """Whether the answer is complete, which ends the request."""


class Sampled(Protocol):
    """What sampling needs to know about a request."""

    params: SamplingParams
    prompt: list[int]
    tokens: list[int]  # the answer so far
    constraint: Constraint | None


class Columns(NamedTuple):
    """The parameters of rows to draw from, as tensors (n, 1), fp32 unless noted."""

    rows: Tensor  # int64 (n): which rows of the logits
    look: int  # how many most likely tokens to consider; 0: all, because only min_p can drop any
    key: Tensor  # int64: key of the noise
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor


def sample(
    logits: Tensor,
    requests: Sequence[Sampled],
    chooser: Callable[[Tensor, Sequence[Draw]], Tensor] | None = None,
) -> Tensor:
    """The next token of each request: int64 (N) from fp32 logits (N, vocab_size), left unmodified.

    chooser: compiled code for the choice.

    If no token can be chosen, it is BROKEN or FORBIDDEN.
    """
    device, (_, vocab_size) = logits.device, logits.shape
    if device.type == "mps":
        logits = logits.cpu()  # MPS has no fp64
    if any(r.params.adjusts or r.constraint for r in requests):
        logits = logits.clone()
        for row, request in zip(logits, requests, strict=True):
            adjust(row, request)
    draws = [(request.params, len(request.tokens)) for request in requests]
    if chooser:
        return chooser(logits, draws)
    groups = columns(draws, vocab_size, logits.device)
    tokens, again = choose(logits, groups)
    for i in again.nonzero()[:, 0].tolist() if groups else ():
        everything = columns(draws[i : i + 1], vocab_size, logits.device, everything=True)
        tokens[i] = choose(logits[i : i + 1], everything)[0]
    return tokens.to(device)


def adjust(logits: Tensor, request: Sampled) -> None:
    """Apply a request's penalties, bias and constraint to its own logits, fp32 (vocab_size), in place.

    Computed in fp64, then relative to the largest, so that large penalties cost small logits no digits.
    """
    params, prompt, answer = request.params, request.prompt, request.tokens
    to_tensor = partial(to_device, device=logits.device)
    exact = logits.double()
    if params.repetition_penalty != 1:
        ids = to_tensor([token for token in (*prompt, *answer) if token < len(exact)])  # skip image tokens
        seen, penalty = exact[ids], params.repetition_penalty
        exact[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if answer and (params.presence_penalty or params.frequency_penalty):
        ids = to_tensor(answer)
        exact[ids] = exact[ids] - params.presence_penalty  # once, even for repeated ids
        exact.index_add_(0, ids, exact.new_full(ids.shape, -params.frequency_penalty))
    if params.logit_bias:
        biases = to_tensor(list(params.logit_bias.values()), dtype=torch.float64)
        exact[to_tensor(list(params.logit_bias))] += biases
    if params.adjusts:
        logits.copy_(exact - exact.max().clamp(min=-1e300))  # clamped in case all are -inf
    if request.constraint:
        request.constraint.mask(answer, logits)


def columns(
    draws: Sequence[Draw], vocab_size: int, device: torch.device, *, everything: bool = False
) -> list[Columns]:
    """The parameters of rows of logits, in groups that `choose` treats alike; greedy rows are left out.

    draws: of each row.
    everything: consider all tokens, for rows that `choose` marked to look at again.
    """
    groups: dict[int, list[int]] = {}
    for row, (params, _) in enumerate(draws):
        limited = params.top_p < 1 or (params.top_k or vocab_size) < vocab_size
        if not limited and (everything or not params.min_p):
            look = 0
        else:
            short = not everything and (params.top_k or 0) <= NUCLEUS_SHORTCUT < vocab_size
            look = NUCLEUS_SHORTCUT if short else vocab_size
        if params.temperature > 0:
            groups.setdefault(look, []).append(row)
    found = []
    for look, rows in groups.items():
        some = [draws[row] for row in rows]
        keys = [key_of(params.seed, n) for params, n in some]
        numbers = [(p.divisor, p.top_p, p.top_k or vocab_size, p.min_p) for p, _ in some]
        tensors = to_device(numbers, device, torch.float32).T[..., None]
        found.append(Columns(to_device(rows, device), look, to_device(keys, device)[:, None], *tensors))
    return found


def choose(logits: Tensor, columns: Sequence[Columns]) -> tuple[Tensor, Tensor]:
    """The next token of each row, without waiting for the device.

    logits: fp32 (N, vocab_size).
    columns: the rows to draw from; the others get their most likely token.

    Returns the tokens, int64 (N), BROKEN or FORBIDDEN if there is none; and bool (N), True if a row
    keeps more tokens than were considered and must be looked at again.
    """
    best, tokens = logits.max(-1)
    again = torch.zeros_like(tokens, dtype=torch.bool)
    for group in columns:
        rows = logits if len(group.rows) == len(logits) else logits[group.rows]
        tokens[group.rows], again[group.rows] = _draw(rows, group)
    finite = best.isfinite()
    return torch.where(finite, tokens, torch.where(best == -math.inf, FORBIDDEN, BROKEN)), again & finite


def _draw(logits: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Draw from the nucleus (Holtzman et al. 2020, section 3.1) of the top_k (Fan et al. 2018, section
    5.4), without what min_p drops (Nguyen et al. 2024, section 3). Returns the same as `choose`."""
    _, look, key, temperature, top_p, top_k, min_p = columns
    vocab_size = logits.shape[-1]
    if look:
        top, ids = logits.topk(look, -1)
        best = top[:, :1]
    else:
        top, ids = logits, torch.arange(vocab_size, device=logits.device)[None]
        best = logits.amax(-1, keepdim=True)
    # Relative to the best, so that low temperatures do not overflow.
    total = ((logits - best) / temperature).logsumexp(-1, keepdim=True)
    probs = ((top - best) / temperature - total).exp()
    dropped = probs < min_p * (-total).exp()
    again = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if look:
        before = probs.cumsum(-1) - probs
        beyond = torch.arange(look, device=logits.device) >= top_k
        limited = top_k < vocab_size
        share = top_p * probs.masked_fill(beyond, 0).sum(-1, keepdim=True).where(limited, 1.0)
        dropped |= (before > share) | beyond
        if look < vocab_size:
            again = ~(dropped[:, -1] | (before[:, -1] + probs[:, -1] > share[:, 0]))
            again |= (limited & (top_k > look))[:, 0]  # the sum of the top_k is unknown
    scores = (top - best).double() / temperature + gumbel(key, ids)
    chosen = scores.masked_fill(dropped, -math.inf).argmax(-1, keepdim=True)
    return ids.expand_as(top).gather(-1, chosen)[:, 0], again


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) under fp32 logits (N, vocab_size), for int64 tokens (N). Returns fp32 (N)."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def top_logprobs(logits: Tensor, n: int) -> list[list[tuple[int, float]]]:
    """For each row of fp32 logits (N, vocab_size), the n most likely ids with log p, best first."""
    top, ids = logits.topk(min(n, logits.shape[-1]), -1)
    logprobs = top - logits.logsumexp(-1, keepdim=True)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), logprobs.tolist(), strict=True)]
