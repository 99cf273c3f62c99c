"""The only loop that generates: requests, steps, stop conditions.

A request is token ids and sampling parameters; nothing here knows about text or tokenizers. It waits
in a queue until one of the model's `max_batch_size` cache slots is free. A step runs the model once
for all requests that have a slot: a bounded chunk of the prompt for those in prefill, one token for
the others. A request's tokens never depend on which other requests share its steps.

Any number of threads may add, run and cancel requests. One thread at a time runs the model, for the
requests of all threads; the others wait for its results. With several ranks, every rank must make the
same calls in the same order, so only one thread per rank may call.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import itemgetter

from llama.engine.invariance import InvariantRunner
from llama.engine.outcomes import Outcome
from llama.engine.request import Event, FinishReason, Request, Work
from llama.engine.runners import Pending, RaggedRunner, Runner
from llama.engine.slots import Slot, Slots
from llama.engine.static import StaticRunner
from llama.engine.turns import Turns
from llama.errors import ArgumentError, PromptError
from llama.model import Row, Transformer
from llama.sampling import BROKEN, FORBIDDEN, Constraint, SamplingParams
from llama.vision import PlacedImage, TiledImage, sighted

ERRORS = {
    BROKEN: "the model's logits are not finite; is the checkpoint damaged?",
    FORBIDDEN: "no token may follow: logit_bias or the constraint, which may be too complex, forbids all",
}


class Engine:
    """Generates for many requests with one model.

    model: its `max_batch_size` is the number of requests that run at the same time.
    prefill_chunk: maximum prompt tokens per step: of one prompt, or of all prompts together while other
      requests wait for their next token.
    batch_invariant: run every matrix product at a shape that depends only on the request, so that its
      logprobs are bit-identical whatever runs alongside it. Raises ArgumentError if the kernels' results
      for a row depend on its position in the batch or on the other rows.
    static: decode at fixed shapes, for a compiled model, and one step ahead of the tokens already read.
      Ignored with batch_invariant, which has shapes of its own.
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
        self.model, self.prefill_chunk = model, prefill_chunk
        fixed_shapes = batch_invariant and not model.step_backend  # a step backend is invariant anyway
        self.ragged = (InvariantRunner if fixed_shapes else RaggedRunner)(model, prefill_chunk)
        self.static = StaticRunner(model) if static and not batch_invariant else None
        self.runners: list[Runner] = [self.static, self.ragged] if self.static else [self.ragged]
        self.slots = Slots(model, self.ragged.reusable, any(runner.clears for runner in self.runners))
        self.waiting: deque[Request] = deque()
        self.pending: list[Pending] = []  # steps started but not settled, at most two
        self.steps = 0
        self.turns = Turns()

    def check(self, prompt: Sequence[int], params: SamplingParams, images: Sequence[TiledImage] = ()) -> None:
        """Raise what `add` would raise."""
        vocab_size, max_seq_len = self.model.params.vocab_size, self.model.params.max_seq_len
        known = vocab_size + bool(images)
        if images:
            sighted(self.model).check_images(prompt, images)
        if not len(prompt):
            raise PromptError("the prompt is empty: it needs at least one token")
        for token in prompt:
            if not (isinstance(token, int) and not isinstance(token, bool) and 0 <= token < known):
                raise PromptError(f"{token!r} is not a token id: ids run from 0 to {vocab_size - 1}")
        if max_seq_len - len(prompt) < (params.max_tokens != 0):
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for a new one in "
                f"max_seq_len={max_seq_len}; shorten it or build with a larger max_seq_len"
            )
        if unknown := [token for token in params.logit_bias if token >= vocab_size]:
            raise ArgumentError(
                f"logit_bias names {unknown[0]}, which is not a token id: ids run from 0 to {vocab_size - 1}"
            )
        if list(params.logit_bias.values()).count(-math.inf) == vocab_size:
            raise ArgumentError("logit_bias forbids every token: leave at least one without -inf")

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        images: Sequence[TiledImage] = (),
        prefix_keys: Sequence[tuple[int, Hashable]] = (),
        listener: Callable[[], object] | None = None,
    ) -> Request:
        """Queue a prompt of token ids. For the other arguments see `Request`.

        images: one for each image token of the prompt, whose id is the model's vocab_size.

        Raises PromptError if the prompt is invalid or leaves no room, ArgumentError if the parameters do
        not fit the model.
        """
        self.check(prompt, params, images)
        self.turns.check_process()
        room = self.model.params.max_seq_len - len(prompt)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        at = [i for i, token in enumerate(prompt) if token == self.model.params.vocab_size]
        placed = [PlacedImage(*pair) for pair in zip(at, images, strict=True)]
        own = [(position, image.key) for position, image in placed]
        keys = sorted((*prefix_keys, *own), key=itemgetter(0))
        request = Request(list(prompt), params, max_tokens, constraint, placed, keys, listener)
        if self._force(request):
            request.finish_reason = "stop"
        else:
            with self.turns.lock:
                self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request and free its slot immediately. Has no effect on a request that has ended."""
        with self.turns.lock:
            if request.finish_reason is None:
                if request in self.waiting:
                    self.waiting.remove(request)
                self._finish(request, "cancelled")
                if self.turns.leader is None and not self.slots.running():
                    self.pending = []

    def has_work(self) -> bool:
        return bool(self.waiting or self.slots.running())

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Run steps until these requests have ended, and yield their events, including those from steps
        of other callers. Several such iterators may alternate, or run in threads.

        Closing an iterator early, or an exception, cancels its unfinished requests.
        """
        told = dict.fromkeys(requests, 0)  # how many events of each have been yielded
        try:
            while told:
                for event in [event for request in told for event in request.events(told[request])]:
                    told[event.request] += 1
                    if event.finish_reason:
                        del told[event.request]
                    yield event
                self._step(until=lambda: not told or any(r.changed(n) for r, n in told.items()))
        finally:
            for request in requests:
                self.cancel(request)

    def step(self) -> None:
        """Run the model once for the requests that have a slot.

        An exception, even KeyboardInterrupt, leaves each request in its state before or after the step.
        """
        self._step(until=lambda: False)

    def forget(self) -> None:
        """Reuse nothing in the cache, because weights were edited in a way that cannot be detected."""
        self.slots.epoch = None

    def close(self) -> None:
        """Decode with ragged steps from now on, and release what the static runner holds."""
        if self.static:
            self.static.close()
            self.static, self.runners = None, [self.ragged]

    def _step(self, until: Callable[[], bool]) -> None:
        """Run a step when it is this thread's turn, unless `until` is true by then."""
        with self.turns.turn(until) as mine:
            if not mine:
                return
            with self.turns.lock:
                if self.slots.reclaim(look_at_weights=bool(self.waiting)):
                    self.pending = []
            while (work := self._plan()) is None:
                self._settle()
            if work:
                runner = next(runner for runner in self.runners if runner.takes(work))
                with self.slots.writing():
                    started = runner.start(work, after=self.pending[-1] if self.pending else None)
                self.pending = [*self.pending, started]
            while self.pending and (len(self.pending) > 1 or not self.pending[0].ahead):
                self._settle()

    def _plan(self) -> list[Work] | None:
        """Each request's work for this step; None if the pending step must be settled first."""
        with self.turns.lock:  # held throughout: a cancellation in between could reassign a slot
            if self.pending and not self._may_run_ahead():
                return None
            self._admit()
            return self._schedule()

    def _may_run_ahead(self) -> bool:
        """Whether the next step is one more token for the same requests, whatever the pending outcome."""
        running = self.slots.running()
        return (
            len(self.pending) == 1
            and self.pending[-1].ahead
            and running == [item.request for item in self.pending[-1].work]
            and not (self.waiting and len(running) < len(self.slots.all))
            and all(len(request.tokens) + 1 < request.max_tokens for request in running)
        )

    def _admit(self) -> None:
        """Assign free slots to waiting requests, in order."""
        while self.waiting:
            request = self.waiting[0]
            if request not in self.slots.running() and not self.slots.admit(request):
                break
            self.waiting.popleft()

    def _schedule(self) -> list[Work]:
        """Each request's work for this step, within the limit on prompt tokens."""
        self.steps += 1
        work = [self._next(slot, slot.request) for slot in self.slots.all if slot.request and not slot.free]
        reading = sorted(
            (item for item in work if item.reads_prompt), key=lambda item: self.slots.all[item.row.slot].used
        )
        scheduled = [item for item in work if not item.reads_prompt]
        room = self.prefill_chunk if scheduled else self.prefill_chunk * len(reading)
        for item in reading:  # longest waiting first, which always fits
            if item.row.length <= room:
                room -= item.row.length
                scheduled.append(item)
        for _, row in scheduled:
            self.slots.all[row.slot].reach = max(self.slots.all[row.slot].reach, row.stop)
        return scheduled

    def _next(self, slot: Slot, request: Request) -> Work:
        """The request's tokens that are not in the cache yet, up to a chunk of them.

        Of the generated tokens, that is only the last one, or more if the cache was lost.
        """
        start = len(slot.tokens) + len(self.pending)  # each pending step adds one token
        if start < len(request.prompt):
            length = min(self.prefill_chunk, len(request.prompt) - start)
        else:
            length = min(self.ragged.reread, request.length + len(self.pending) - start)
        return Work(request, Row(slot.index, start, length))

    def _settle(self) -> None:
        """Wait for the oldest pending step and record its outcomes in its requests.

        May be interrupted at any point: the step then stays pending and is settled again from the start.
        """
        pending = self.pending[0]
        outcomes = pending.wait()
        with self.turns.lock:
            pending.ahead = False  # no other step may start before this one is settled
            for item, outcome in zip(pending.work, outcomes, strict=True):
                if item.request.finish_reason is None:
                    self._enter(item, outcome)
            restart = any(outcome.restart for outcome in outcomes) or not self.slots.running()
            self.pending = [] if restart else self.pending[1:]

    def _enter(self, item: Work, outcome: Outcome) -> None:
        request, row, params = item.request, item.row, item.request.params
        slot = self.slots.all[row.slot]
        slot.tokens[row.start :] = item.tokens
        slot.used = self.steps
        n = row.start + bool(row.start)  # a chunk's first token was scored with the previous chunk
        request.prompt_logprobs[n : n + len(outcome.prompt_logprobs)] = outcome.prompt_logprobs
        request.prompt_top_logprobs[n : n + len(outcome.prompt_top_logprobs)] = outcome.prompt_top_logprobs
        token = BROKEN if any(map(math.isnan, outcome.prompt_logprobs)) else outcome.token
        if token in ERRORS:
            return self._finish(request, "error", ERRORS[token])
        if token is not None:
            # Finite logits show that all keys and values before them are finite.
            slot.committed = self.ragged.reusable(request, row.stop)
            if token in params.stop_token_ids:
                return self._finish(request, "stop")
            n = row.stop - len(request.prompt)
            if params.logprobs and outcome.logprob is not None:
                request.logprobs[n:] = [outcome.logprob]
            if params.top_logprobs and outcome.top_logprobs is not None:
                request.top_logprobs[n:] = [outcome.top_logprobs]
            request.tokens[n:] = [token]
            if self._force(request):
                return self._finish(request, "stop")
        if row.stop >= len(request.prompt) and len(request.tokens) == request.max_tokens:
            return self._finish(request, "length")
        if request.listener:
            request.listener()

    def _force(self, request: Request) -> bool:
        """Append the tokens that a constraint forces. Returns whether the answer is complete.

        They need no sampling, and the next step reads them together. If logprobs are requested, they
        are sampled anyway.
        """
        if not request.constraint or not request.max_tokens:
            return False
        if not request.params.logprobs:
            room = max(0, request.max_tokens - 1 - len(request.tokens))
            request.tokens += request.constraint.forced(request.tokens)[:room]
        return request.constraint.finished(request.tokens)

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        request.error = error
        request.finish_reason = reason
        self.slots.release(request)
        if request.listener:
            request.listener()
