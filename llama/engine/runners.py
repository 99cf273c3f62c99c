"""How a step is computed: the interface of a runner, and the one for rows of any length."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from llama.device import one_thread
from llama.engine.outcomes import Outcome, choose_next, draw_next, is_plain, score_prompt
from llama.engine.request import Request, Work
from llama.model import Transformer
from llama.ranks import lost_rank_as_error
from llama.vision import VisionTransformer


class Pending(Protocol):
    """A step that has been started."""

    work: Sequence[Work]
    ahead: bool  # whether the next step may start before this one's outcomes are known

    def wait(self) -> Sequence[Outcome]:
        """Wait for the device. Returns the outcome of each item of work. May be called again."""


class Runner(Protocol):
    """A way of computing a step."""

    clears: bool  # whether what a slot's last request left in the cache must be cleared

    def takes(self, work: Sequence[Work]) -> bool:
        """Whether it can compute this step."""

    def start(self, work: Sequence[Work], after: Pending | None) -> Pending:
        """Start a step. after: the previous step, if pending: each token then follows one of its tokens."""


@dataclass
class Done:
    """A step that was computed as it was started."""

    work: Sequence[Work]
    outcomes: Sequence[Outcome]
    ahead: bool = False

    def wait(self) -> Sequence[Outcome]:
        return self.outcomes


class RaggedRunner:
    """Runs the model once for rows of any length.

    reread: how many generated tokens a request re-reads per step if the cache was lost.
    """

    clears = False

    def __init__(self, model: Transformer, reread: int) -> None:
        self.model, self.reread = model, reread
        # A step backend's results never depend on other rows, so logprobs must not either.
        self.draw = 1 if model.step_backend else 0

    def reusable(self, request: Request, n: int) -> int:
        """How many of a request's first n positions any other request may reuse."""
        return n

    def takes(self, work: Sequence[Work]) -> bool:
        return True

    def start(self, work: Sequence[Work], after: Pending | None = None) -> Pending:
        return Done(work, self.run(work, draw=self.draw))

    def run(self, work: Sequence[Work], width: int = 0, draw: int = 0) -> list[Outcome]:
        """Run the model over some work.

        width: pad tokens and logits to this many rows.
        draw: rows to draw at a time; 0: all.
        """
        model = self.model
        if model.step_backend and all(map(is_plain, work)):
            return draw_next(model, work)
        if isinstance(model, VisionTransformer):
            with lost_rank_as_error(model.parallel):
                for item in work:
                    model.place(item.row.slot, item.request.images)
        with one_thread if model.step_backend else nullcontext(), lost_rank_as_error(model.parallel):
            new = [token for item in work for token in item.tokens]
            tokens = torch.tensor(new + [0] * (width - len(new)), device=model.device)
            hidden = model.hidden(tokens, [item.row for item in work])  # (N, dim)
            ends = list(accumulate(item.row.length for item in work))
            scores = [score_prompt(model, item, hidden, end) for item, end in zip(work, ends, strict=True)]
            last = {
                item.request: end - 1
                for item, end in zip(work, ends, strict=True)
                if item.row.stop == item.request.length and item.request.max_tokens
            }
            chosen = {}
            if last:
                rows = [*last.values(), *[0] * (width - len(last))]
                logits = model.logits(hidden if rows == list(range(len(hidden))) else hidden[rows])
                chosen = choose_next(model, list(last), logits[: len(last)] if width else logits, draw)
        return [
            chosen.get(item.request, Outcome())._replace(prompt_logprobs=logprobs, prompt_top_logprobs=top)
            for item, (logprobs, top) in zip(work, scores, strict=True)
        ]
