"""From the engine's tokens to pieces of text: whole characters, and never a part of a stop string."""

import asyncio
import codecs
import contextlib
import functools
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from llama.arguments import TextRequest
from llama.engine import Engine, Event, Request, TopLogprobs
from llama.engine import FinishReason as EngineReason
from llama.errors import ArgumentError
from llama.moderation import Category, Review
from llama.tokenizer import Message
from llama.tools.parser import Delta, ToolCall, add_deltas

FinishReason = EngineReason | Literal["tool_calls", "content_filter"]


class Decoder(Protocol):
    """What a tokenizer offers here."""

    def decode(self, t: Sequence[int]) -> str: ...

    def decode_bytes(self, t: Sequence[int]) -> bytes: ...


class TextStream:
    """Turns token ids into pieces of text, which joined are the decoded ids up to a stop string.

    A token may end in the middle of a character or of a stop string. What could be the beginning of
    either is held back until the next token tells. Bytes that are no UTF-8 become U+FFFD.

    stop: strings that end the text and are not part of it. The one that is complete first counts,
    and of two that end together the longer, however the tokens are cut.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self.stopped: str | None = None  # the stop string that was hit
        self._tokenizer = tokenizer
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._held = ""

    def push(self, token: int, *, prompt: bool = False) -> str:
        """The text that is certain now; none any more once a stop string was hit.

        prompt: a token that was given, not generated, so no stop string is looked for.
        """
        data = self._tokenizer.decode_bytes([token])
        if data and not self._begun:
            self._begun = True
            # sentencepiece drops the space before a text's first word.
            if data.startswith(b" ") and not self._tokenizer.decode([token]).startswith(" "):
                data = data[1:]
        text = self._utf8.decode(data)
        return text if prompt else self._certain(text)

    def flush(self) -> str:
        """What was held back, once no token follows."""
        text = self._certain(self._utf8.decode(b"", final=True))
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _certain(self, new: str) -> str:
        text = self._held + new
        if self.stopped is not None:
            return ""
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            return text[:at]
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        held = next(
            n
            for n in range(min(longest, len(text)), -1, -1)
            if n == 0 or any(stop.startswith(text[-n:]) for stop in self._stop)
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


@dataclass(frozen=True)
class Stats:
    """Counts and speed of one request.

    reused_tokens: of the prompt's, those that the KV cache held already. first_token_seconds: until
    the first token was read, a wait for a slot included. tokens_per_second: of those after it.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class StreamEvent:
    """One token of one request, or its end: then `finish_reason` and `stats` are not None.

    index: which answer of the call: those to the first prompt come first.
    text: what became certain of the text. It may be behind `token`, where that ends in the middle of a
    character or of what may become a stop string; all pieces joined are the whole text.
    logprob, top_logprobs: of the token, if asked for; ids and log-probabilities, most likely first.
    tool_calls: what became certain of the calls that the answer makes, if it was given tools.
    finish_reason: "stop" (a stop token or string), "length" (max_gen_len or the context is used up),
    "tool_calls" (the answer calls tools), "content_filter" (a guard refused the question or the answer),
    "cancelled", or "error", and then `error` says what is wrong.
    categories: what a guard objected to.
    stop: the stop string that ended the answer, if one did.
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

    index: which answer of the call it is.
    cancel: ends the request, once nothing counts any more that the model would go on to say.
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
        self._first = 0.0  # when the first token came
        self._count = 0

    def read(self, event: Event) -> Iterator[StreamEvent]:
        """What an event brings."""
        if self._echo and event.finish_reason not in ("error", "cancelled"):
            self._echo = False
            yield from self._prompt(event.request)
        if event.finish_reason:
            yield self._end(event)
        elif event.token is not None and not self._complete:  # else the engine ran ahead
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
        """Whether nothing that the model would go on to say counts."""
        return self._text.stopped is not None or (self._tools is not None and self._tools.complete)

    def _parse(self, text: str, ended: bool = False) -> tuple[str, tuple[Delta, ...]]:
        """What is content in a piece of text, and what belongs to calls."""
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


class ReviewedReader(Reader):
    """A reader that holds back what a guard has not seen yet."""

    def __init__(self, review: Review, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._review = review
        self._held: list[StreamEvent] = []
        self._seen = ""  # the answer so far, its calls included
        self._refused = False

    def read(self, event: Event) -> Iterator[StreamEvent]:
        """What an event brings, once the guard has no objection; or the end, if it has."""
        for brought in super().read(event):
            if self._refused:
                return
            self._held.append(brought)
            calls = "".join(delta.name + delta.arguments for delta in brought.tool_calls)
            self._seen += brought.text + calls
            if brought.finish_reason or len(self._held) == self._review.every:
                yield from self._checked(brought)

    def _checked(self, last: StreamEvent) -> list[StreamEvent]:
        end = StreamEvent(self._index, finish_reason="content_filter", stats=last.stats)
        try:
            categories = self._review.refuses(self._seen)
            if categories is None:
                held, self._held = self._held, []
                return held
            end = replace(end, categories=categories)
        except ArgumentError as error:  # such as a conversation that is too long for the guard
            message = f"prompt {self._index}: the guard cannot check the answer: {error}"
            end = replace(end, finish_reason="error", error=message)
        self._refused = True
        self._cancel()
        return [end]


def create_reader(
    tokenizer: Decoder, source: TextRequest, index: int, cancel: Callable[[], object]
) -> Reader:
    """The reader that a request wants. For the arguments see `Reader`."""
    if source.review:
        return ReviewedReader(source.review, tokenizer, source, index, cancel)
    return Reader(tokenizer, source, index, cancel)


@contextlib.contextmanager
def _queued(
    engine: Engine, tokenizer: Decoder, sources: Sequence[TextRequest]
) -> Iterator[dict[Request, Reader]]:
    """Queue requests, each with its reader; cancel at the end those that have not ended."""
    readers: dict[Request, Reader] = {}
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
    """The ends of what a guard refused before it began."""
    return [
        StreamEvent(index, finish_reason="content_filter", categories=source.review.refused)
        for index, source in enumerate(sources)
        if source.review and source.review.refused is not None
    ]


def stream(
    engine: Engine, tokenizer: Decoder, sources: Sequence[TextRequest]
) -> Generator[StreamEvent, None, None]:
    """Run requests, and yield what comes of them. Closing it cancels what has not ended.

    Raises what `Engine.add` raises.
    """
    yield from refusals(sources)
    with _queued(engine, tokenizer, sources) as readers:
        for event in engine.run(list(readers)):
            yield from readers[event.request].read(event)


async def astream(
    engine: Engine, tokenizer: Decoder, sources: Sequence[TextRequest] | Callable[[], Sequence[TextRequest]]
) -> AsyncGenerator[StreamEvent, None]:
    """`stream` for asyncio. A thread runs the requests, however slowly the caller takes the events.

    sources: or what makes them and takes its time, in a thread of its own.
    """
    if callable(sources):
        sources = await asyncio.to_thread(sources)
    for end in refusals(sources):
        yield end
    loop, events = asyncio.get_running_loop(), asyncio.Queue[StreamEvent | Exception | None]()

    def run(readers: Mapping[Request, Reader]) -> None:
        def post(event: StreamEvent | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            for event in engine.run(list(readers)):
                for piece in readers[event.request].read(event):  # which a guard may take its time for
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


@dataclass
class Answer:
    """All events of one request, put together. stop: the stop string that ended it, if one did."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    calls: list[ToolCall] = field(default_factory=list)
    categories: tuple[Category, ...] = ()
    stop: str | None = None

    def add(self, event: StreamEvent) -> None:
        """Raises RuntimeError if the request failed."""
        if event.finish_reason == "error":
            raise RuntimeError(event.error)
        self.text += event.text
        add_deltas(self.calls, event.tool_calls)
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        if event.top_logprobs is not None:
            self.top_logprobs.append(event.top_logprobs)
        if event.finish_reason:
            self.finish_reason, self.categories, self.stop = event.finish_reason, event.categories, event.stop

    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [call.to_message() for call in self.calls]
        return message


def collect(events: Iterator[StreamEvent]) -> list[Answer]:
    """Read a stream to its end. Raises RuntimeError if one of its requests failed."""
    answers: defaultdict[int, Answer] = defaultdict(Answer)
    for event in events:
        answers[event.index].add(event)
    return [answers[i] for i in sorted(answers)]
