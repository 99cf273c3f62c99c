"""From the engine's events to the caller's: pieces of text and tool calls, as soon as they are final."""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llama.arguments import TextRequest
from llama.engine import Engine, Event, Request, TopLogprobs
from llama.engine import FinishReason as EngineReason
from llama.moderation import Category, EventReader, ReviewedReader
from llama.tokenizer.text_stream import Decoder, TextStream
from llama.tools.parser import Delta

FinishReason = EngineReason | Literal["tool_calls", "content_filter"]


@dataclass(frozen=True)
class Stats:
    """Counts and speed of one request.

    reused_tokens: prompt tokens that were in the KV cache already.
    first_token_seconds: time to the first token, including any wait for a slot.
    tokens_per_second: rate of the tokens after the first.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class StreamEvent:
    """One token of one request, or its end, which has `finish_reason` and `stats`.

    index: which answer of the call; those to the first prompt come first.
    text: text that is now final. It lags behind `token` if that ends within a character or within what
    may become a stop string; joined, the pieces are the whole text.
    logprob, top_logprobs: of the token, if requested; ids and log-probabilities, most likely first.
    tool_calls: the parts of tool calls that are now final.
    finish_reason: "stop" (a stop token or string), "length" (max_gen_len or the context is used up),
    "tool_calls" (the answer calls tools), "content_filter" (a guard blocked the question or the answer),
    "cancelled", or "error", in which case `error` has the message.
    categories: the hazard categories that a guard reported.
    stop: the stop string that ended the answer, if any.
    """

    index: int
    text: str = ""
    token: int | None = None
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    stats: Stats | None = None
    tool_calls: tuple[Delta, ...] = ()
    categories: tuple[Category, ...] = ()
    stop: str | None = None


class Reader:
    """Turns the engine's events of one request into stream events.

    index: which answer of the call this is.
    cancel: ends the request once the rest of its output would be ignored.
    """

    def __init__(
        self, tokenizer: Decoder, source: TextRequest, index: int, cancel: Callable[[], object]
    ) -> None:
        self._index = index
        self._cancel = cancel
        self._text = TextStream(tokenizer, source.stop)
        self._tools = source.tools
        self._called = False
        self._echo = source.echo
        self._began = time.perf_counter()
        self._first = 0.0  # when the first token arrived
        self._count = 0

    def read(self, event: Event) -> Iterator[StreamEvent]:
        """The stream events that an engine event leads to."""
        if self._echo and event.finish_reason not in ("error", "cancelled"):
            self._echo = False
            yield from self._prompt(event.request)
        if event.finish_reason:
            yield self._end(event)
        elif event.token is not None and not self._complete:  # otherwise the engine ran ahead
            self._first = self._first or time.perf_counter()
            self._count += 1
            piece, calls = self._parse(self._text.push(event.token))
            yield StreamEvent(
                self._index, piece, event.token, event.logprob, event.top_logprobs, tool_calls=calls
            )
            if self._complete:
                self._cancel()

    @property
    def _complete(self) -> bool:
        """Whether the rest of the model's output would be ignored."""
        return self._text.stopped is not None or (self._tools is not None and self._tools.complete)

    def _parse(self, text: str, ended: bool = False) -> tuple[str, tuple[Delta, ...]]:
        """Split a piece of text into content and parts of tool calls."""
        if self._tools is None:
            return text, ()
        deltas = self._tools.push(text) + (self._tools.finish() if ended else [])
        calls = tuple(delta for delta in deltas if delta.call is not None)
        self._called = self._called or bool(calls)
        return "".join(delta.content for delta in deltas), calls

    def _prompt(self, request: Request) -> Iterator[StreamEvent]:
        scored, images = request.params.prompt_logprobs, {position for position, _ in request.images}
        for n, token in enumerate(request.prompt):
            logprob = request.prompt_logprobs[n] if scored else None
            top = request.prompt_top_logprobs[n] if scored and request.params.top_logprobs else None
            piece = "" if n in images else self._text.push(token, prompt=True)
            yield StreamEvent(self._index, piece, token, logprob, top)

    def _end(self, event: Event) -> StreamEvent:
        (piece, calls), now = self._parse(self._text.flush(), ended=True), time.perf_counter()
        stats = Stats(
            prompt_tokens=len(event.request.prompt),
            reused_tokens=event.request.reused,
            new_tokens=self._count,
            first_token_seconds=(self._first or now) - self._began,
            tokens_per_second=(self._count - 1) / (now - self._first) if self._count > 1 else 0.0,
        )
        reason = "stop" if self._complete else event.finish_reason
        return StreamEvent(
            self._index,
            piece,
            tool_calls=calls,
            finish_reason="tool_calls" if reason == "stop" and self._called else reason,
            error=event.error and f"prompt {self._index}: {event.error}",
            stats=stats,
            stop=self._text.stopped,
        )


def create_reader(
    tokenizer: Decoder, source: TextRequest, index: int, cancel: Callable[[], object]
) -> EventReader:
    """The reader for a request. For the arguments see `Reader`."""
    reader = Reader(tokenizer, source, index, cancel)
    return ReviewedReader(reader, source.review, cancel) if source.review else reader


@contextlib.contextmanager
def _queued(
    engine: Engine, tokenizer: Decoder, sources: Sequence[TextRequest]
) -> Iterator[dict[Request, EventReader]]:
    """Queue requests, each with its reader; on exit, cancel those that have not ended."""
    readers: dict[Request, EventReader] = {}
    try:
        for index, source in enumerate(sources):
            if source.review and source.review.refused is not None:
                continue
            request = engine.add(
                source.prompt, source.params, constraint=source.constraint, images=source.images
            )
            cancel = functools.partial(engine.cancel, request)
            readers[request] = create_reader(tokenizer, source, index, cancel)
        yield readers
    finally:
        for request in readers:
            engine.cancel(request)


def refusals(sources: Sequence[TextRequest]) -> list[StreamEvent]:
    """The final events of requests that a guard blocked before they began."""
    return [
        StreamEvent(index, finish_reason="content_filter", categories=source.review.refused)
        for index, source in enumerate(sources)
        if source.review and source.review.refused is not None
    ]


def stream(
    engine: Engine, tokenizer: Decoder, sources: Sequence[TextRequest]
) -> Generator[StreamEvent, None, None]:
    """Run requests and yield their events. Closing the stream cancels requests that have not ended.

    Raises what `Engine.add` raises.
    """
    yield from refusals(sources)
    with _queued(engine, tokenizer, sources) as readers:
        for event in engine.run(list(readers)):
            yield from readers[event.request].read(event)


async def astream(
    engine: Engine, tokenizer: Decoder, sources: Sequence[TextRequest] | Callable[[], Sequence[TextRequest]]
) -> AsyncGenerator[StreamEvent, None]:
    """`stream` for asyncio. A thread runs the requests, however slowly the caller reads the events.

    sources: the requests, or a slow function that returns them, which runs in a thread.
    """
    if callable(sources):
        sources = await asyncio.to_thread(sources)
    for end in refusals(sources):
        yield end
    loop, events = asyncio.get_running_loop(), asyncio.Queue[StreamEvent | Exception | None]()

    def run(readers: Mapping[Request, EventReader]) -> None:
        def post(event: StreamEvent | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody is listening
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            for event in engine.run(list(readers)):
                for piece in readers[event.request].read(event):  # a guard may make this slow
                    post(piece)
            post(None)
        except Exception as error:
            post(error)

    with _queued(engine, tokenizer, sources) as readers:
        threading.Thread(target=run, args=(readers,), daemon=True).start()
        while piece := await events.get():
            if isinstance(piece, Exception):
                raise piece
            yield piece
