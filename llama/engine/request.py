"""What goes into the engine and what comes out: a request, and the events of its life."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llama.model import Row
from llama.sampling import Constraint, SamplingParams
from llama.vision import PlacedImage

FinishReason = Literal["stop", "length", "cancelled", "error"]
TopLogprobs = list[tuple[int, float]]  # ids and log-probabilities, most likely first


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine. Its lists grow as it is generated.

    `logprobs` and `top_logprobs` are parallel to `tokens`, and `prompt_…` to `prompt`; they are
    empty unless the parameters request them.

    images: at the positions of the prompt's image tokens, in order.
    prefix_keys: what the cache depends on besides the ids, as (position, key) in order: from that
      position on, keys and values are shared only with requests that have the same key there.
    listener: called after every change, on the thread that runs the model, so it must return quickly.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    constraint: Constraint | None = None
    images: Sequence[PlacedImage] = ()
    prefix_keys: Sequence[tuple[int, Hashable]] = ()
    listener: Callable[[], object] | None = None
    tokens: list[int] = field(default_factory=list)  # generated, without the stop token
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs] = field(default_factory=list)
    reused: int = 0  # how many of the prompt's tokens were in the cache already
    slot: int | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None  # the message, if finish_reason is "error"

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def changed(self, told: int) -> bool:
        """Whether there are events after the first `told`."""
        return self.finish_reason is not None or len(self.tokens) > told

    def events(self, told: int) -> "list[Event]":
        """What has happened after the first `told` events: one for each token, and one for the end."""
        ended = self.finish_reason is not None  # read first, because it is set last
        events = []
        for n in range(told, len(self.tokens)):
            logprob = self.logprobs[n] if self.params.logprobs else None
            top = self.top_logprobs[n] if self.params.top_logprobs else None
            events.append(Event(self, self.tokens[n], logprob, top))
        if ended:
            events.append(Event(self, finish_reason=self.finish_reason, error=self.error))
        return events


@dataclass(frozen=True)
class Event:
    """What a step did for one request: a token, or the end (which has a `finish_reason`)."""

    request: Request
    token: int | None = None
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


class Work(NamedTuple):
    """One request's part of a step: which of its tokens the model reads, and their place in the cache."""

    request: Request
    row: Row

    @property
    def tokens(self) -> list[int]:
        prompt, answer, (_, start, length) = self.request.prompt, self.request.tokens, self.row
        first = max(0, start - len(prompt))
        return [*prompt[start : start + length], *answer[first : max(0, start + length - len(prompt))]]

    @property
    def reads_prompt(self) -> bool:
        return self.row.start < len(self.request.prompt)
