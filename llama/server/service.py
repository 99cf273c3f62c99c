"""The service behind every API: accepts or refuses requests, and delivers their events."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Literal, TypeVar

from llama.arguments import ChatOptions, Options, TextRequest
from llama.engine import Event, Request
from llama.errors import ArgumentError
from llama.generation import Llama
from llama.guard import Guard, Verdict
from llama.moderation import EventReader, conversation, reviews
from llama.predictions import Answer
from llama.server.driver import Driver, Ticket
from llama.server.errors import BusyError, DeadlineError, DrainingError, GenerationError, ModelNameError
from llama.server.metrics import Metrics
from llama.server.traces import Span
from llama.streaming import Stats, StreamEvent, create_reader, refusals
from llama.tokenizer import Dialog

T = TypeVar("T")

log = logging.getLogger("llama.server")


@dataclass(frozen=True)
class Limits:
    """Limits on requests.

    queue: answers that may wait for a slot; further requests are refused.
    timeout: maximum seconds per request, including its wait.
    body: maximum bytes of a request.
    """

    queue: int = 256
    timeout: float = 600
    body: int = 8 << 20


class Generation:
    """An accepted request; use it with `async with`, which cancels unfinished answers at the end.

    prompt_tokens: of all prompts, each counted once.
    new_tokens: tokens generated so far.
    cached_tokens: prompt tokens that were in the KV cache already.
    """

    def __init__(self, service: "Service", sources: Sequence[TextRequest]) -> None:
        # Answers to the same prompt share its list of ids.
        firsts = {id(source.prompt): i for i, source in reversed([*enumerate(sources)])}
        self._firsts = set(firsts.values())
        self.prompt_tokens = sum(len(sources[i].prompt) for i in self._firsts)
        self.new_tokens = 0
        self.cached_tokens = 0
        self.limits = service.limits
        self._service = service
        self._deadline = time.monotonic() + service.limits.timeout
        self._arrived: asyncio.Queue[tuple[int, Sequence[Event]] | None] = asyncio.Queue()
        self._sources = sources
        self._refused = refusals(sources)
        self._span = Span()
        self._span.add(
            {"gen_ai.request.model": service.name, "gen_ai.usage.input_tokens": self.prompt_tokens}
        )
        self._texts = [""] * len(sources)  # of the answers so far, if they are logged
        self._tickets: list[Ticket] = []
        self._readers: dict[int, EventReader] = {}
        for index, source in enumerate(sources):
            if source.review and source.review.refused is not None:
                continue
            ticket = service.driver.submit(source, partial(self._deliver, asyncio.get_running_loop(), index))
            cancel = partial(service.driver.cancel, ticket)
            self._tickets.append(ticket)
            self._readers[index] = create_reader(service.llama.tokenizer, source, index, cancel)

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        for ticket in self._tickets:
            self._service.driver.cancel(ticket)
        self._service.generations.discard(self)

    def fail(self) -> None:
        """Make `events` raise GenerationError, because the model failed."""
        self._arrived.put_nowait(None)

    async def events(self) -> AsyncIterator[StreamEvent]:
        """The events until every answer has ended.

        Raises DeadlineError after the time limit, GenerationError if the model fails.
        """
        for refused in self._refused:
            self._service.metrics.ended.labels("content_filter").inc()
            yield refused
        left = len(self._tickets)
        while left:
            try:
                arrived = await asyncio.wait_for(self._arrived.get(), self._deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise DeadlineError(f"the request took longer than {self.limits.timeout:g} seconds") from None
            if arrived is None:
                raise GenerationError("the model is no longer running")
            index, news = arrived
            for item in news:
                for event in await self._read(index, item):
                    if event.error:
                        raise GenerationError(event.error)
                    if event.finish_reason:
                        left -= 1
                    if event.stats:
                        self._count(event, event.stats)
                    if self._service.log_prompts:
                        self._log(event)
                    yield event

    async def _read(self, index: int, event: Event) -> list[StreamEvent]:
        read = self._readers[index].read
        if self._sources[index].review:  # a guard may run, which is slow
            return await asyncio.to_thread(lambda: list(read(event)))
        return list(read(event))

    async def answers(self) -> list[Answer]:
        """All answers, once all have ended. Raises what `events` raises."""
        answers = [Answer() for _ in self._sources]
        async for event in self.events():
            answers[event.index].add(event)
        return answers

    def _deliver(
        self, loop: asyncio.AbstractEventLoop, index: int, _: Request, events: Sequence[Event]
    ) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody is listening
            loop.call_soon_threadsafe(self._arrived.put_nowait, (index, events))

    def _log(self, event: StreamEvent) -> None:
        calls = "".join(delta.name + delta.arguments for delta in event.tool_calls)
        self._texts[event.index] += event.text + calls
        if event.finish_reason:
            text = self._texts[event.index]
            log.info("answer", extra={"fields": {"index": event.index, "text": text}})

    def _count(self, event: StreamEvent, stats: Stats) -> None:
        self.new_tokens += stats.new_tokens
        self.cached_tokens += stats.reused_tokens if event.index in self._firsts else 0
        self._service.metrics.observe(stats, event.finish_reason or "")
        self._span.add(
            {
                "gen_ai.usage.output_tokens": self.new_tokens,
                "gen_ai.usage.cache_read.input_tokens": self.cached_tokens,
                "gen_ai.response.time_to_first_chunk": stats.first_token_seconds,
            }
        )


class SharedGuard:
    """A guard with its model on several ranks, which check together between two steps."""

    def __init__(self, guard: Guard, driver: Driver) -> None:
        self.version = guard.version
        self._driver = driver

    def check(self, dialogs: Sequence[Dialog]) -> list[Verdict]:
        """See `Guard.check`."""
        verdicts: list[Verdict] = self._driver.call("check", dialogs).result()
        return verdicts


class Service:
    """A model that is served.

    name: the model's name for clients.
    guard: checks what users ask and what the model answers.
    log_prompts: whether prompts and answers are logged.
    draining: whether new requests are refused because the server is shutting down.
    """

    draining = False
    _beside = 0  # requests answered without generating

    def __init__(
        self,
        llama: Llama,
        driver: Driver,
        name: str,
        limits: Limits,
        prefix: str,
        guard: Guard | SharedGuard | None,
        log_prompts: bool = False,
    ) -> None:
        self.llama = llama
        self.guard = guard
        self.log_prompts = log_prompts
        self.driver = driver
        self.name = name
        self.limits = limits
        self.created = int(time.time())
        self.generations: set[Generation] = set()  # those being read
        self.slots = llama.model.params.max_batch_size
        self.metrics = Metrics(
            prefix,
            running=lambda: min(driver.unfinished(), self.slots),
            waiting=lambda: max(driver.unfinished() - self.slots, 0),
        )

    @property
    def status(self) -> Literal["ok", "draining", "failed"]:
        return "failed" if self.driver.failure else "draining" if self.draining else "ok"

    def check_model(self, name: str) -> None:
        """Raise ModelNameError unless a request is for this model."""
        if name != self.name:
            raise ModelNameError(f"the model {name!r} does not exist here; this server has {self.name!r}")

    async def complete(self, prompts: Sequence[str | list[int]], options: Options) -> Generation:
        """Continue texts or lists of ids. Raises BusyError, or ArgumentError for an invalid request."""

        def prepare() -> list[TextRequest]:
            tokenizer = self.llama.tokenizer
            ids = [tokenizer.encode(p, bos=True, eos=False) if isinstance(p, str) else p for p in prompts]
            requests = self.llama.requests(ids, **options)
            if self.guard:
                texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts]
                checks = reviews(self.guard, [[{"role": "user", "content": text}] for text in texts], None)
                n = len(requests) // len(prompts)
                requests = [replace(r, review=checks[i // n]) for i, r in enumerate(requests)]
            return requests

        self._check_open()
        return self._accept(await asyncio.to_thread(prepare))

    async def chat(self, dialog: Dialog, options: ChatOptions) -> Generation:
        """Answer a dialog. Raises BusyError, or ArgumentError for an invalid request."""
        self._check_open()
        if self.guard:
            options = {**options, "guard": self.guard}
        return self._accept(await asyncio.to_thread(self.llama.chat_requests, [dialog], **options))

    async def encode(self, dialog: Dialog, options: ChatOptions) -> list[int]:
        """Token ids of a dialog's prompt. Raises ArgumentError as `chat` does."""
        (request,) = await asyncio.to_thread(self.llama.chat_requests, [dialog], **options)
        return request.prompt

    async def embed(
        self, texts: Sequence[str | Sequence[int]], pooling: str
    ) -> tuple[list[list[float]], int]:
        """Vectors of texts, and their number of tokens. Raises BusyError, or what `Llama.embed` raises."""
        self._check_open()

        async def work() -> tuple[list[list[float]], int]:
            batches = await asyncio.to_thread(lambda: list(self.llama.token_batches(texts)))
            self._log(*(ids for batch in batches for ids in batch))
            calls = [asyncio.wrap_future(self.driver.call("embed", batch, pooling)) for batch in batches]
            vectors = [vector for found in await asyncio.gather(*calls) for vector in found.tolist()]
            return vectors, sum(len(ids) for batch in batches for ids in batch)

        return await self._bounded(work)

    async def moderate(self, dialogs: Sequence[Dialog]) -> list[Verdict]:
        """The guard's verdicts. Raises BusyError, or ArgumentError as `Guard.check` or without a guard."""
        self._check_open()
        if self.guard is None:
            raise ArgumentError("this server has no guard to moderate with: start it with --guard DIR")
        if self.log_prompts:
            log.info("moderation", extra={"fields": {"dialogs": [conversation(d) for d in dialogs]}})
        return await self._bounded(partial(asyncio.to_thread, self.guard.check, dialogs))

    async def _bounded(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run work that does not generate, within the limits."""
        if self._beside >= self.slots + self.limits.queue:
            raise BusyError(f"{self._beside} requests are running or waiting; try again later")
        self._beside += 1
        try:
            return await asyncio.wait_for(work(), self.limits.timeout)
        except asyncio.TimeoutError:
            raise DeadlineError(f"the request took longer than {self.limits.timeout:g} seconds") from None
        finally:
            self._beside -= 1

    def _check_open(self) -> None:
        if self.draining:
            raise DrainingError("this server is shutting down; use another one")

    def _accept(self, sources: Sequence[TextRequest]) -> Generation:
        capacity, unfinished = self.slots + self.limits.queue, self.driver.unfinished()
        if len(sources) > capacity:
            raise ArgumentError(f"{len(sources)} answers requested, but this server accepts {capacity}")
        if unfinished + len(sources) > capacity:
            raise BusyError(f"{unfinished} answers are running or waiting; try again later")
        generation = Generation(self, sources)
        self._log(*{id(source.prompt): source.prompt for source in sources}.values())
        self.generations.add(generation)
        return generation

    def _log(self, *prompts: Sequence[int]) -> None:
        """Log prompts as the model reads them, if that is wanted."""
        if self.log_prompts:
            tokenizer = self.llama.tokenizer
            for ids in prompts:  # an image's token is none of the tokenizer's
                text = tokenizer.decode([token for token in ids if token < tokenizer.n_words])
                log.info("prompt", extra={"fields": {"text": text}})

    def fail(self) -> None:
        """Make all waiting requests fail, because the model failed."""
        for generation in self.generations:
            generation.fail()
