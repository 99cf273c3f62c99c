"""The one loop that generates: requests, cache slots, steps, stop conditions, prefix reuse.

A request is token ids and sampling parameters; nothing here knows text or tokenizers. It waits in a
queue until one of the model's `max_batch_size` cache slots is free. `step()` runs the model once, for
all requests that have a slot: a bounded chunk of the prompt for those still reading theirs, one token
for the others. A request's tokens never depend on which others share its steps.

A plain object without threads: `add` and `cancel` between steps, `step` until nothing is left.
Under several ranks, every rank must make the same calls in the same order.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llama.model import Row, Transformer
from llama.parallel import lost_rank_as_error
from llama.sampling import SamplingParams, sample, token_logprobs

FinishReason = Literal["stop", "length", "cancelled", "error"]

# Prompt positions projected to the vocabulary at once when a prompt's own logprobs are asked for:
# at 128,256 entries of fp32 each, 256 of them take 131 MB where a prompt of 8192 would take 4.2 GB.
LOGPROB_ROWS = 256


class PromptError(ValueError):
    """A prompt that cannot be generated from: empty, too long, or with ids outside the vocabulary."""


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine. `tokens` and `logprobs` grow as it goes."""

    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)  # generated, without the stop token
    logprobs: list[float] = field(default_factory=list)  # of `tokens`, if asked for
    prompt_logprobs: list[float] = field(default_factory=list)  # of `prompt`, if asked for
    finish_reason: FinishReason | None = None
    max_tokens: int = 0
    slot: int | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class Event:
    """What a step did for one request: a token, the end, or both.

    token: the new one, or None where the request ended without (a stop token, a cancellation).
    error: a sentence, where finish_reason is "error".
    """

    request: Request
    token: int | None = None
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass
class Slot:
    """One sequence's place in the KV cache."""

    index: int
    tokens: list[int] = field(default_factory=list)  # whose keys and values the cache holds
    request: Request | None = None

    def common_prefix(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens this slot holds already."""
        same = (i for i, (a, b) in enumerate(zip(self.tokens, prompt, strict=False)) if a != b)
        return next(same, min(len(self.tokens), len(prompt)))


class Engine:
    """Generates for many requests over one model.

    model: its cache's `max_batch_size` is the number of requests that run at once.
    prefill_chunk: at most so many tokens of a prompt go into one step.
    """

    def __init__(self, model: Transformer, *, prefill_chunk: int = 512) -> None:
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be 1 or more, not {prefill_chunk}")
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Request] = deque()
        self.slots = [Slot(index) for index in range(model.params.max_batch_size)]

    def add(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queue a prompt of token ids. Raises PromptError where nothing can be generated from it."""
        prompt = list(prompt)
        room = self.model.params.max_seq_len - len(prompt)
        wanted = room if params.max_tokens is None else params.max_tokens
        vocab_size = self.model.params.vocab_size
        if not prompt:
            raise PromptError("the prompt is empty: it needs one token at least")
        for token in prompt:
            if not (isinstance(token, int) and 0 <= token < vocab_size):
                raise PromptError(f"{token!r} is not a token id: the vocabulary has 0 to {vocab_size - 1}")
        if room < (params.max_tokens != 0):
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for a new one in "
                f"max_seq_len={self.model.params.max_seq_len}; shorten it or build with a larger max_seq_len"
            )
        request = Request(prompt, params, max_tokens=min(wanted, room))
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request where it is; its slot is free at once. Nothing happens to an ended one."""
        if request.finish_reason is None:
            if request.slot is None:
                self.waiting.remove(request)
            self._finish(request, "cancelled")

    def has_work(self) -> bool:
        return bool(self.waiting) or any(slot.request for slot in self.slots)

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Step until these requests have ended, and yield what happens to them.

        Closing the iterator early, or an exception, cancels those that have not.
        """
        mine = {id(request) for request in requests}
        try:
            while any(request.finish_reason is None for request in requests):
                yield from (event for event in self.step() if id(event.request) in mine)
        finally:
            for request in requests:
                self.cancel(request)

    def step(self) -> list[Event]:
        """Run the model once for every request that has a slot, and say what came of it."""
        if self.model.cache_owner is not self:  # somebody called the model: read everything again
            self.model.cache_owner = self
            for slot in self.slots:
                slot.tokens = []
        self._admit()
        running = [(slot, slot.request) for slot in self.slots if slot.request]
        if not running:
            return []
        pending = [self._pending(slot, request) for slot, request in running]
        rows = [
            Row(slot.index, len(slot.tokens), len(new))
            for (slot, _), new in zip(running, pending, strict=True)
        ]
        with lost_rank_as_error(self.model.parallel):
            tokens = torch.tensor([token for new in pending for token in new], device=self.model.device)
            hidden = self.model.hidden(tokens, rows).split([row.length for row in rows])
            ready, last = [], []
            for (slot, request), new, states in zip(running, pending, hidden, strict=True):
                if request.params.prompt_logprobs:
                    self._score_prompt(request, states, len(slot.tokens))
                slot.tokens += new
                if len(slot.tokens) == request.length:
                    ready.append(request)
                    last.append(states[-1])
            return self._decode(ready, torch.stack(last)) if ready else []

    def _admit(self) -> None:
        """Give each waiting request, in order, the free slot that holds most of its prompt already."""
        while self.waiting and (free := [slot for slot in self.slots if not slot.request]):
            request = self.waiting.popleft()
            slot = max(free, key=lambda slot: slot.common_prefix(request.prompt))
            # The last token's logits are needed in any case, and a scored prompt's are all.
            reused = 0 if request.params.prompt_logprobs else slot.common_prefix(request.prompt[:-1])
            del slot.tokens[reused:]
            slot.request, request.slot = request, slot.index

    def _pending(self, slot: Slot, request: Request) -> list[int]:
        """The tokens that a slot's request has and its cache has not, up to a chunk of them."""
        cached = len(slot.tokens)
        if cached >= len(request.prompt):
            return request.tokens[cached - len(request.prompt) :]
        return request.prompt[cached : cached + self.prefill_chunk]

    def _score_prompt(self, request: Request, states: Tensor, start: int) -> None:
        """Logprobs of the prompt's tokens that follow the positions start … of `states` (n, dim)."""
        if start == 0:
            request.prompt_logprobs.append(0.0)
        following = torch.tensor(request.prompt[start + 1 : start + 1 + len(states)], dtype=torch.int64)
        for some, targets in zip(states.split(LOGPROB_ROWS), following.split(LOGPROB_ROWS), strict=False):
            request.prompt_logprobs += token_logprobs(
                self.model.logits(some[: len(targets)]), targets.to(states.device)
            ).tolist()

    def _decode(self, requests: list[Request], states: Tensor) -> list[Event]:
        """The next token of each request, from the hidden state of its last, `states` (n, dim)."""
        logits = self.model.logits(states)
        chosen = sample(logits, [r.params for r in requests], [len(r.tokens) for r in requests])
        self.model.parallel.broadcast(chosen)  # kernels may differ between ranks; the tokens must not
        logprobs = (
            token_logprobs(logits, chosen).tolist()
            if any(r.params.logprobs for r in requests)
            else [None] * len(requests)
        )
        broken = (~logits.amax(-1).isfinite()).tolist()
        return [
            self._advance(*item) for item in zip(requests, chosen.tolist(), logprobs, broken, strict=True)
        ]

    def _advance(self, request: Request, token: int, logprob: float | None, broken: bool) -> Event:
        """Take one sampled token into a request."""
        if len(request.tokens) == request.max_tokens:  # only where no token at all was asked for
            return self._finish(request, "length")
        if broken:
            return self._finish(
                request, "error", "the model's logits are not finite; is the checkpoint damaged?"
            )
        if token in request.params.stop_token_ids:
            return self._finish(request, "stop")
        request.tokens.append(token)
        if request.params.logprobs and logprob is not None:
            request.logprobs.append(logprob)
        if len(request.tokens) == request.max_tokens:
            self._finish(request, "length")
        return Event(request, token, logprob, request.finish_reason)

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> Event:
        request.finish_reason = reason
        if request.slot is not None:
            self.slots[request.slot].request = None  # its tokens stay, for who shares the prefix
            request.slot = None
        return Event(request, finish_reason=reason, error=error)
