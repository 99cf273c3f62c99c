"""From a step's hidden states and logits to its outcomes: next tokens and logprobs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.engine.request import Request, TopLogprobs, Work
from llama.model import Transformer
from llama.sampling import sample, token_logprobs, top_logprobs

# Prompt positions projected to the vocabulary at once when a prompt's own logprobs are requested: with
# 128,256 fp32 entries each, 256 of them take 131 MB; a whole prompt of 8192 would take 4.2 GB.
LOGPROB_ROWS = 256


class Outcome(NamedTuple):
    """The result of a step for one request.

    token: the next token, BROKEN or FORBIDDEN; None if the step read only part of the prompt.
    prompt_logprobs, prompt_top_logprobs: of the part of the prompt that was read, if requested.
    restart: whether a step that began with another token must be discarded.
    """

    token: int | None = None
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    prompt_logprobs: Sequence[float] = ()
    prompt_top_logprobs: Sequence[TopLogprobs] = ()
    restart: bool = False


def is_plain(item: Work) -> bool:
    """Whether a token follows, its logits only serve to draw it, unchanged, and the request has no images."""
    request, params = item.request, item.request.params
    more = params.logprobs or params.prompt_logprobs or params.adjusts or request.constraint or request.images
    return not more and item.row.stop == request.length and request.max_tokens > 0


def draw_next(model: Transformer, work: Sequence[Work]) -> list[Outcome]:
    """The outcomes of plain work, in one call of the model's step backend."""
    assert model.step_backend
    ids, rows = [token for item in work for token in item.tokens], [item.row for item in work]
    draws = [(item.request.params, len(item.request.tokens)) for item in work]
    model.begin(rows)
    tokens = model.step_backend.next_tokens(ids, rows, draws, model.cache.data, model.rotations)
    return [Outcome(token) for token in tokens]


def choose_next(
    model: Transformer, requests: Sequence[Request], logits: Tensor, draw: int = 0
) -> dict[Request, Outcome]:
    """The next token of each request, from the logits after its last one, fp32 (N, vocab_size).

    draw: rows to draw at a time, because sums too may depend on the number of rows; 0: all.
    """
    draw = draw or len(requests)
    parts = [slice(first, first + draw) for first in range(0, len(requests), draw)]
    if model.step_backend:
        tokens = sample(logits, requests, model.step_backend.choose)
    else:
        tokens = torch.cat([sample(logits[part], requests[part]) for part in parts])
    model.parallel.broadcast(tokens)  # kernels may differ between ranks, but tokens must not
    logprobs: list[float | None] = [None] * len(requests)
    if any(request.params.logprobs for request in requests):
        known = tokens.clamp(min=0)
        logprobs = torch.cat([token_logprobs(logits[part], known[part]) for part in parts]).tolist()
    top: list[TopLogprobs | None] = [
        top_logprobs(logits[i : i + 1], request.params.top_logprobs)[0]
        if request.params.top_logprobs
        else None
        for i, request in enumerate(requests)
    ]
    return dict(zip(requests, map(Outcome, tokens.tolist(), logprobs, top), strict=True))


def score_prompt(
    model: Transformer, item: Work, hidden: Tensor, end: int
) -> tuple[list[float], list[TopLogprobs]]:
    """Logprobs of the prompt tokens that follow those of `item`, whose states end before row `end`.

    The prompt's first token gets 0 and no alternatives.
    """
    request, row, params = item.request, item.row, item.request.params
    if not (params.prompt_logprobs and item.reads_prompt):
        return [], []
    states = hidden[end - row.length : end]
    logprobs: list[float] = [] if row.start else [0.0]
    top: list[TopLogprobs] = [] if row.start else [[]]
    following = request.prompt[row.start + 1 : row.stop + 1]
    for first in range(0, len(following), LOGPROB_ROWS):
        targets = torch.tensor(following[first : first + LOGPROB_ROWS], device=states.device)
        logits = model.logits(states[first : first + len(targets)])
        given = targets == logits.shape[-1]  # the image token is never generated and has no logit
        logprobs += token_logprobs(logits, targets.masked_fill(given, 0)).masked_fill(given, 0).tolist()
        top += top_logprobs(logits, params.top_logprobs) if params.top_logprobs else []
    return logprobs, top if params.top_logprobs else []
