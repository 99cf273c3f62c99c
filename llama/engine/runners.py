"""How a step is computed: what a runner is, and the one that runs rows of any length."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from llama.engine.request import Outcome, Request, TopLogprobs, Work
from llama.model import Transformer
from llama.parallel import lost_rank_as_error
from llama.sampling import sample, token_logprobs, top_logprobs
from llama.vision import VisionTransformer

# Prompt positions projected to the vocabulary at once when a prompt's own logprobs are asked for:
# at 128,256 entries of fp32 each, 256 of them take 131 MB, where a prompt of 8192 would take 4.2 GB.
LOGPROB_ROWS = 256


class Pending(Protocol):
    """A step that has been started."""

    work: Sequence[Work]
    ahead: bool  # whether the next step may start before this one's outcomes are known

    def wait(self) -> Sequence[Outcome]:
        """What it brings for each item of work, once the device is done. May be called again."""


class Runner(Protocol):
    """A way of computing a step."""

    clears: bool  # whether what a slot's last request left in the cache must be cleared

    def takes(self, work: Sequence[Work]) -> bool:
        """Whether it can compute this step."""

    def start(self, work: Sequence[Work], after: Pending | None) -> Pending:
        """Start a step. after: the step before, if it is pending: each token follows one of its tokens."""


@dataclass
class Done:
    """A step that was computed when it was started."""

    work: Sequence[Work]
    outcomes: Sequence[Outcome]
    ahead: bool = False

    def wait(self) -> Sequence[Outcome]:
        return self.outcomes


class RaggedRunner:
    """Runs the model once for rows of any length.

    reread: how many generated tokens a request reads in one step if the cache was lost.
    """

    clears = False

    def __init__(self, model: Transformer, reread: int) -> None:
        self.model, self.reread = model, reread

    def reusable(self, request: Request, n: int) -> int:
        """How many of the first n positions of a request any other request may reuse."""
        return n

    def takes(self, work: Sequence[Work]) -> bool:
        return True

    def start(self, work: Sequence[Work], after: Pending | None = None) -> Pending:
        return Done(work, self.run(work))

    def run(self, work: Sequence[Work], width: int = 0, draw: int = 0) -> list[Outcome]:
        """Run the model over some work.

        width: pad tokens and logits to this many rows. draw: rows to draw at a time; 0: all.
        """
        model = self.model
        with lost_rank_as_error(model.parallel):
            new = [token for item in work for token in item.tokens]
            tokens = torch.tensor(new + [0] * (width - len(new)), device=model.device)
            if isinstance(model, VisionTransformer):
                for item in work:
                    model.place(item.row.slot, item.request.images)
            hidden = model.hidden(tokens, [item.row for item in work])  # (N, dim)
            ends = list(accumulate(item.row.length for item in work))
            scores = [
                score_prompt(model, item, hidden[end - item.row.length : end])
                for item, end in zip(work, ends, strict=True)
            ]
            last = {
                item.request: end - 1
                for item, end in zip(work, ends, strict=True)
                if item.row.stop == item.request.length and item.request.max_tokens
            }
            chosen = {}
            if last:
                rows = [*last.values(), *[0] * (width - len(last))]
                chosen = choose_next(model, list(last), model.logits(hidden[rows])[: len(last)], draw)
        return [
            chosen.get(item.request, Outcome())._replace(prompt_logprobs=logprobs, prompt_top_logprobs=top)
            for item, (logprobs, top) in zip(work, scores, strict=True)
        ]


def choose_next(
    model: Transformer, requests: Sequence[Request], logits: Tensor, draw: int = 0
) -> dict[Request, Outcome]:
    """The next token of each request, from the logits after its last one, fp32 (N, vocab_size).

    draw: how many rows to draw at a time, because sums too may add up in another order; 0: all.
    """
    draw = draw or len(requests)
    parts = [slice(first, first + draw) for first in range(0, len(requests), draw)]
    tokens = torch.cat([sample(logits[part], requests[part]) for part in parts])
    model.parallel.broadcast(tokens)  # kernels may differ between ranks; the tokens must not
    logprobs: list[float | None] = [None] * len(requests)
    if any(request.params.logprobs for request in requests):
        known = tokens.clamp(min=0)
        logprobs = torch.cat([token_logprobs(logits[part], known[part]) for part in parts]).tolist()
    top = [
        top_logprobs(row[None], request.params.top_logprobs)[0] if request.params.top_logprobs else None
        for request, row in zip(requests, logits, strict=True)
    ]
    return dict(zip(requests, map(Outcome, tokens.tolist(), logprobs, top), strict=True))


def score_prompt(model: Transformer, item: Work, states: Tensor) -> tuple[list[float], list[TopLogprobs]]:
    """Logprobs of the prompt's tokens that follow those of `item`, whose states are (n, dim).

    The prompt's very first token gets 0, and no alternatives.
    """
    request, row, params = item.request, item.row, item.request.params
    if not (params.prompt_logprobs and item.reads_prompt):
        return [], []
    logprobs: list[float] = [] if row.start else [0.0]
    top: list[TopLogprobs] = [] if row.start else [[]]
    following = request.prompt[row.start + 1 : row.stop + 1]
    for first in range(0, len(following), LOGPROB_ROWS):
        targets = torch.tensor(following[first : first + LOGPROB_ROWS], device=states.device)
        logits = model.logits(states[first : first + len(targets)])
        given = targets == logits.shape[-1]  # the image token has no logit, for nobody generates it
        logprobs += token_logprobs(logits, targets.masked_fill(given, 0)).masked_fill(given, 0).tolist()
        top += top_logprobs(logits, params.top_logprobs) if params.top_logprobs else []
    return logprobs, top if params.top_logprobs else []
