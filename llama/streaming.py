"""From the engine's tokens to pieces of text: whole characters, and never a part of a stop string."""

import codecs
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llama.engine import Engine
from llama.engine.request import FinishReason, TopLogprobs
from llama.sampling import SamplingParams


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

    index: which prompt or dialog of the call.
    text: what became certain of the text. It may be behind `token`, where that ends in the middle of a
    character or of what may become a stop string; all pieces joined are the whole text.
    logprob, top_logprobs: of the token, if asked for; ids and log-probabilities, most likely first.
    finish_reason: "stop" (a stop token or string), "length" (max_gen_len or the context is used up),
    "cancelled", or "error", and then `error` says what is wrong.
    """

    index: int
    text: str = ""
    token: int | None = None
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    stats: Stats | None = None


def stream(
    engine: Engine,
    tokenizer: Decoder,
    prompts: Sequence[tuple[Sequence[int], SamplingParams]],
    stop: Sequence[str] = (),
    echo: bool = False,
) -> Generator[StreamEvent, None, None]:
    """Queue prompts of token ids, and yield what comes of them. Closing it cancels what has not ended.

    echo: yield the prompts' tokens too. Raises what `Engine.add` raises.
    """
    began = time.perf_counter()
    texts = [TextStream(tokenizer, stop) for _ in prompts]
    first = [0.0] * len(prompts)  # when its first token came
    counts = [0] * len(prompts)
    requests = []
    try:
        for prompt, params in prompts:
            requests.append(engine.add(prompt, params))
        index = {request: i for i, request in enumerate(requests)}
        unread = set(requests) if echo else set()
        for event in engine.run(requests):
            request, i = event.request, index[event.request]
            text = texts[i]
            if request in unread and event.finish_reason not in ("error", "cancelled"):
                unread.remove(request)
                for n, token in enumerate(request.prompt):
                    scored = request.params.prompt_logprobs
                    logprob = request.prompt_logprobs[n] if scored else None
                    top = request.prompt_top_logprobs[n] if scored and request.params.top_logprobs else None
                    yield StreamEvent(i, text.push(token, prompt=True), token, logprob, top)
            if event.token is not None:
                if text.stopped is None:  # else the engine was ahead of the reader
                    first[i] = first[i] or time.perf_counter()
                    counts[i] += 1
                    piece = text.push(event.token)
                    yield StreamEvent(i, piece, event.token, event.logprob, event.top_logprobs)
                    if text.stopped is not None:
                        engine.cancel(request)
                continue
            piece, now = text.flush(), time.perf_counter()
            stats = Stats(
                prompt_tokens=len(request.prompt),
                reused_tokens=request.reused,
                new_tokens=counts[i],
                first_token_seconds=(first[i] or now) - began,
                tokens_per_second=(counts[i] - 1) / (now - first[i]) if counts[i] > 1 else 0.0,
            )
            reason = event.finish_reason if text.stopped is None else "stop"
            error = f"prompt {i}: {event.error}" if event.error else None
            yield StreamEvent(i, piece, finish_reason=reason, error=error, stats=stats)
    finally:
        for request in requests:
            engine.cancel(request)


@dataclass
class Answer:
    """All events of one request, put together."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)


def collect(events: Iterator[StreamEvent], n: int) -> list[Answer]:
    """Read a stream of n requests to its end. Raises RuntimeError where one of them failed."""
    answers = [Answer() for _ in range(n)]
    pieces: list[list[str]] = [[] for _ in range(n)]
    for event in events:
        if event.finish_reason == "error":
            raise RuntimeError(event.error)
        pieces[event.index].append(event.text)
        answer = answers[event.index]
        if event.token is not None:
            answer.tokens.append(event.token)
        if event.logprob is not None:
            answer.logprobs.append(event.logprob)
        if event.top_logprobs is not None:
            answer.top_logprobs.append(event.top_logprobs)
    for answer, parts in zip(answers, pieces, strict=True):
        answer.text = "".join(parts)
    return answers
