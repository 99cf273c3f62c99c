"""The one loop that generates: requests, cache slots, steps, stop conditions, prefix reuse.

A request is token ids and sampling parameters; nothing here knows text or tokenizers. It waits in a
queue until one of the model's `max_batch_size` cache slots is free. `step()` runs the model once, for
all requests that have a slot: a bounded chunk of the prompt for those still reading theirs, one token
for the others. A request's tokens never depend on which others share its steps.

A plain object without threads: `add` and `cancel` between steps, `step` until nothing is left.
Under several ranks, every rank must make the same calls in the same order.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from llama.engine.invariance import check_batch_invariance
from llama.engine.request import Event, FinishReason, Request, TopLogprobs
from llama.engine.static import BROKEN, Decoder, Flight, launch
from llama.errors import ArgumentError, PromptError
from llama.model import Row, Transformer
from llama.parallel import lost_rank_as_error
from llama.sampling import SamplingParams, sample, token_logprobs, top_logprobs

# Prompt positions projected to the vocabulary at once when a prompt's own logprobs are asked for:
# at 128,256 entries of fp32 each, 256 of them take 131 MB where a prompt of 8192 would take 4.2 GB.
LOGPROB_ROWS = 256


class Choice(NamedTuple):
    token: int  # or BROKEN
    logprob: float | None
    top_logprobs: TopLogprobs | None


@dataclass
class Slot:
    """One sequence's place in the KV cache."""

    index: int
    tokens: list[int] = field(default_factory=list)  # whose keys and values the cache holds
    sound: int = 0  # so many of them may serve other requests
    request: Request | None = None
    used: int = 0  # the last step that it took part in


class Work(NamedTuple):
    """One slot's part in a step: the request's next tokens, and where in the cache they go."""

    slot: Slot
    request: Request
    tokens: list[int]
    row: Row

    @property
    def reads(self) -> bool:
        """Whether this is a part of the prompt, rather than the last token generated."""
        return self.row.start < len(self.request.prompt)


class Engine:
    """Generates for many requests over one model.

    model: its cache's `max_batch_size` is the number of requests that run at once.
    prefill_chunk: at most so many tokens of a prompt go into one step; while others wait for their
    next token, so many of all prompts together.
    batch_invariant: run every matrix product at a shape that depends on the request alone, so that
    its logprobs are the same to the bit whatever company it has. Raises ValueError where the model's
    kernels give a row other bits at another place in the batch or beside other rows.
    static: decode at shapes that stay the same, for a compiled model, and one step ahead of the tokens
    that are read. Not with batch_invariant, whose shapes are its own.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        prefill_chunk: int = 512,
        batch_invariant: bool = False,
        static: bool = False,
    ) -> None:
        if prefill_chunk < 1:
            raise ArgumentError(f"prefill_chunk must be 1 or more, not {prefill_chunk}")
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.batch_invariant = batch_invariant
        self.waiting: deque[Request] = deque()
        self.slots = [Slot(index) for index in range(model.params.max_batch_size)]
        self.decoder = Decoder(model) if static and not batch_invariant else None
        self.flight: Flight | None = None  # a step whose tokens have not been read yet
        self.steps = 0
        # Kernels work in blocks of rows, so a power of two has no odd rows at its end.
        self.width = 1 << (len(self.slots) - 1).bit_length()
        if batch_invariant:
            check_batch_invariance(model, self.width)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise what `add` raises."""
        vocab_size, max_seq_len = self.model.params.vocab_size, self.model.params.max_seq_len
        if not len(prompt):
            raise PromptError("the prompt is empty: it needs one token at least")
        for token in prompt:
            if not (isinstance(token, int) and 0 <= token < vocab_size):
                raise PromptError(f"{token!r} is not a token id: the vocabulary has 0 to {vocab_size - 1}")
        if max_seq_len - len(prompt) < (params.max_tokens != 0):
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for a new one in "
                f"max_seq_len={max_seq_len}; shorten it or build with a larger max_seq_len"
            )
        if unknown := [token for token in params.logit_bias if token >= vocab_size]:
            raise ArgumentError(
                f"logit_bias names {unknown[0]}, which is not a token id: the vocabulary has 0 to "
                f"{vocab_size - 1}"
            )

    def add(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queue a prompt of token ids.

        Raises PromptError where nothing can be generated from it, ValueError for parameters that do
        not fit the model.
        """
        self.check(prompt, params)
        room = self.model.params.max_seq_len - len(prompt)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        request = Request(list(prompt), params, max_tokens)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request where it is; its slot is free at once. Nothing happens to an ended one."""
        if request.finish_reason is None:
            if request.slot is None:
                self.waiting.remove(request)
            self._finish(request, "cancelled")
            if not self._running():
                self.flight = None

    def has_work(self) -> bool:
        return bool(self.waiting or self._running())

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Step until these requests have ended, and yield what happens to them, in steps that others
        made too: several of these iterators may take turns.

        Closing one early, or an exception, cancels its requests that have not ended.
        """
        told = dict.fromkeys(requests, 0)  # how many tokens of each have been yielded
        try:
            while told:
                for request in list(told):
                    while told[request] < len(request.tokens):
                        told[request] += 1
                        yield request.event(told[request] - 1)
                    if request.finish_reason:
                        del told[request]
                        yield Event(request, finish_reason=request.finish_reason, error=request.error)
                if told:
                    self.step()
        finally:
            for request in requests:
                self.cancel(request)

    def step(self) -> list[Event]:
        """Run the model for the requests that have a slot, and say what came of it.

        An exception leaves every request as it was before the step or after it.
        """
        if self.model.cache_owner is not self:  # somebody called the model: read everything again
            self.model.cache_owner = self
            for slot in self.slots:
                slot.tokens, slot.sound = [], 0
            self.flight = None
            if self.decoder and hasattr(self.model, "cache"):
                self.model.cache.zero_()  # see _finish
        if self.flight and not self._flies_on(self.flight):
            return self._land()
        self._admit()
        work = self._schedule()
        self.steps += 1
        if self.decoder and work and all(item.row.length == 1 and not item.reads for item in work):
            return self._decode(self.decoder, work)
        if not self.batch_invariant:
            return self._forward(work) if work else []
        # Every shape depends on one request alone: a chunk of a prompt goes by itself, and the new
        # tokens, however few, go with padding for all slots.
        runners = [item for item in work if not item.reads]
        events = self._forward(runners, self.width) if runners else []
        for item in work:
            if item.reads:
                events += self._forward([item])
        return events

    def _running(self) -> dict[int, Request]:
        """The requests that have a slot, by its number."""
        return {slot.index: slot.request for slot in self.slots if slot.request}

    def _flies_on(self, flight: Flight) -> bool:
        """Whether the next step is one more token for the same requests, whatever this one brings."""
        running = self._running()
        return (
            running == flight.requests
            and not (self.waiting and len(running) < len(self.slots))
            and all(len(r.tokens) + 1 < r.max_tokens for r in flight.requests.values())
        )

    def _decode(self, decoder: Decoder, work: list[Work]) -> list[Event]:
        """One token for each request by a static step, or the one before, if that could be waited for."""
        requests = {item.slot.index: item.request for item in work}
        # A token that is still in the air follows the last one known.
        positions = {item.slot.index: item.row.start + bool(self.flight) for item in work}
        if not any(r.params.adjusts or r.params.top_logprobs for r in requests.values()):
            return self._land(launch(decoder, requests, positions, self.flight))
        with lost_rank_as_error(self.model.parallel):
            logits = decoder.decode(requests, positions)[list(requests)]
            choices = self._choose(list(requests.values()), logits)
        return self._settle(work, [([], [])] * len(work), choices)

    def _land(self, following: Flight | None = None) -> list[Event]:
        """Take what comes of the step in the air into its requests; `following` is then the one that is."""
        flight, self.flight = self.flight, None
        events: list[Event] = []
        if not flight:
            self.flight = following
            return events
        with lost_rank_as_error(self.model.parallel):
            landed = flight.land(self.model)
        for index, (token, logprob, redone) in landed.items():
            request, slot = flight.requests[index], self.slots[index]
            if request.finish_reason:  # by its last token, or cancelled since
                continue
            if redone:
                following = None  # it began with another token
            tokens = request.tokens[-1:]
            item = Work(slot, request, tokens, Row(index, len(slot.tokens), 1))
            slot.tokens += tokens
            slot.used = self.steps
            events += self._take(item, Choice(token, logprob, None))
        self.flight = following if self._running() else None
        return events

    def _admit(self) -> None:
        """Give waiting requests, in order, the free slots, with what any slot holds of their prompts.

        A slot whose tokens all belong to the prompt is continued. Otherwise the prefix is copied to
        the free slot unused for longest: two chats that begin alike do not drive each other out.
        """
        while self.waiting and (free := [slot for slot in self.slots if not slot.request]):
            request = self.waiting[0]
            source = max(self.slots, key=lambda slot: self._reusable(slot, request))
            reused = self._reusable(source, request)
            continues = not source.request and reused == len(source.tokens)
            slot = source if continues and reused else min(free, key=lambda slot: slot.used)
            prefix, slot.tokens = source.tokens[:reused], []
            if slot is not source:
                self.model.copy_cache(source.index, slot.index, reused)
            slot.tokens, slot.sound = prefix, reused
            self.waiting.popleft()
            slot.request, request.slot, request.reused = request, slot.index, reused

    def _reusable(self, slot: Slot, request: Request) -> int:
        """How many of a request's first tokens need not be read, where it gets what this slot holds."""
        if request.params.prompt_logprobs:
            return 0  # all logits are needed
        # The last token's logits are, in any case.
        tokens, prompt = slot.tokens[: slot.sound], request.prompt[:-1]
        same = (i for i, (a, b) in enumerate(zip(tokens, prompt, strict=False)) if a != b)
        count = next(same, min(len(tokens), len(prompt)))
        # Chunks begin where they would without reuse, so that they have the same shapes.
        return count - count % self.prefill_chunk if self.batch_invariant else count

    def _schedule(self) -> list[Work]:
        """What each slot has to do in this step, within the bound on reading."""
        work = [self._pending(slot, slot.request) for slot in self.slots if slot.request]
        readers = sorted((item for item in work if item.reads), key=lambda item: item.slot.used)
        runners = [item for item in work if not item.reads]
        if not runners:
            return readers  # nobody waits for a next token
        room = self.prefill_chunk
        for item in readers:  # in turn: whose last chunk is longest ago comes first, and always fits
            if item.row.length <= room:
                room -= item.row.length
                runners.append(item)
        return runners

    def _pending(self, slot: Slot, request: Request) -> Work:
        """The tokens that a slot's request has and its cache has not, up to a chunk of them.

        Of those generated that is the last one, or all where the cache was lost.
        """
        start, generated = len(slot.tokens), len(slot.tokens) - len(request.prompt)
        if generated < 0:
            tokens = request.prompt[start : start + self.prefill_chunk]
        else:
            tokens = request.tokens[generated : generated + 1 if self.batch_invariant else None]
        return Work(slot, request, tokens, Row(slot.index, start, len(tokens)))

    def _forward(self, work: list[Work], width: int = 0) -> list[Event]:
        """Run the model once, padded to `width` tokens, and take what comes of it into the requests."""
        with lost_rank_as_error(self.model.parallel):
            new = [token for item in work for token in item.tokens]
            padding = [0] * (width - len(new))
            tokens = torch.tensor(new + padding, device=self.model.device)
            hidden = self.model.hidden(tokens, [item.row for item in work])  # (N, dim)
            ends = list(accumulate(item.row.length for item in work))
            scores = [
                self._score_prompt(item, hidden[end - item.row.length : end])
                for item, end in zip(work, ends, strict=True)
            ]
            last = {
                item.request: end - 1
                for item, end in zip(work, ends, strict=True)
                if item.row.stop == item.request.length and item.request.max_tokens
            }
            choices = {}
            if last:
                padding = [0] * (width - len(last))
                logits = self.model.logits(hidden[[*last.values(), *padding]])[: len(last)]
                choices = self._choose(list(last), logits)
        return self._settle(work, scores, choices)

    def _settle(
        self,
        work: list[Work],
        scores: list[tuple[list[float], list[TopLogprobs]]],
        choices: dict[Request, Choice],
    ) -> list[Event]:
        """Take what a step has brought into its requests."""
        events = []
        for item, (logprobs, top) in zip(work, scores, strict=True):
            item.slot.tokens += item.tokens
            item.slot.used = self.steps
            item.request.prompt_logprobs += logprobs
            item.request.prompt_top_logprobs += top
            choice = choices.get(item.request)
            if any(map(math.isnan, logprobs)):
                choice = Choice(BROKEN, None, None)
            events += self._take(item, choice)
        return events

    def _score_prompt(self, item: Work, states: Tensor) -> tuple[list[float], list[TopLogprobs]]:
        """Logprobs of the prompt's tokens that follow those of `item`, whose states are (n, dim).

        The prompt's very first token gets 0, and no alternatives.
        """
        params = item.request.params
        if not (params.prompt_logprobs and item.reads):
            return [], []
        if len(item.request.prompt_logprobs) > item.row.start + bool(item.row.start):
            return [], []  # they were scored before the cache was lost
        logprobs: list[float] = [] if item.row.start else [0.0]
        top: list[TopLogprobs] = [] if item.row.start else [[]]
        following = item.request.prompt[item.row.start + 1 : item.row.stop + 1]
        for first in range(0, len(following), LOGPROB_ROWS):
            targets = torch.tensor(following[first : first + LOGPROB_ROWS], device=states.device)
            logits = self.model.logits(states[first : first + len(targets)])
            logprobs += token_logprobs(logits, targets).tolist()
            if params.top_logprobs:
                top += top_logprobs(logits, params.top_logprobs)
        return logprobs, top if params.top_logprobs else []

    def _choose(self, requests: list[Request], logits: Tensor) -> dict[Request, Choice]:
        """The next token of each request, by the logits after its last, fp32 (N, vocab_size)."""
        # Sums too may add up in another order for another number of rows.
        size = 1 if self.batch_invariant else len(requests)
        parts = [slice(first, first + size) for first in range(0, len(requests), size)]
        chosen = torch.cat(
            [
                sample(
                    logits[part],
                    [r.params for r in requests[part]],
                    [r.prompt for r in requests[part]],
                    [r.tokens for r in requests[part]],
                )
                for part in parts
            ]
        ).masked_fill_(~logits.amax(-1).isfinite(), BROKEN)
        self.model.parallel.broadcast(chosen)  # kernels may differ between ranks; the tokens must not
        logprobs: list[float | None] = [None] * len(requests)
        if any(r.params.logprobs for r in requests):
            known = chosen.clamp(min=0)
            logprobs = torch.cat([token_logprobs(logits[part], known[part]) for part in parts]).tolist()
        top = [
            top_logprobs(row[None], r.params.top_logprobs)[0] if r.params.top_logprobs else None
            for r, row in zip(requests, logits, strict=True)
        ]
        return dict(zip(requests, map(Choice, chosen.tolist(), logprobs, top), strict=True))

    def _take(self, item: Work, choice: Choice | None) -> list[Event]:
        """Take a sampled token, if it has come to that, into a request, or end it."""
        request, events = item.request, list[Event]()
        if choice and choice.token == BROKEN:
            error = "the model's logits are not finite; is the checkpoint damaged?"
            return [self._finish(request, "error", error)]
        if choice:
            # Finite logits vouch for all keys and values before them. And bitwise, only whole chunks of
            # a prompt are what they would be in another request.
            whole = len(request.prompt) - len(request.prompt) % self.prefill_chunk
            item.slot.sound = whole if self.batch_invariant else len(item.slot.tokens)
            if choice.token in request.params.stop_token_ids:
                return [self._finish(request, "stop")]
            request.tokens.append(choice.token)
            if request.params.logprobs and choice.logprob is not None:
                request.logprobs.append(choice.logprob)
            if choice.top_logprobs is not None:
                request.top_logprobs.append(choice.top_logprobs)
            events.append(request.event(-1))
        if item.row.stop >= len(request.prompt) and len(request.tokens) == request.max_tokens:
            events.append(self._finish(request, "length"))
        return events

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> Event:
        if request.slot is not None:
            slot = self.slots[request.slot]
            slot.request = None  # what is sound stays, for who shares the prefix
            if self.decoder and self.model.cache_owner is self:
                # A mask hides what is left over from others, unless it is not finite. Beyond the tokens
                # there may be those of two steps in the air, or of a chunk that an exception cut off.
                stop = len(slot.tokens) + max(2, self.prefill_chunk)
                self.model.cache[:, :, slot.index, :, slot.sound : stop] = 0
            del slot.tokens[slot.sound :]
            request.slot = None
        request.finish_reason, request.error = reason, error
        return Event(request, finish_reason=reason, error=error)
