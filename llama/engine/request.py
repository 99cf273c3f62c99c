"""What goes into the engine and what comes out: a request, and the events of its life."""

from dataclasses import dataclass, field
from typing import Literal

from llama.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]
TopLogprobs = list[tuple[int, float]]  # ids and log-probabilities, most likely first


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine. The lists grow as it goes.

    `logprobs` and `top_logprobs` stand beside `tokens`, and `prompt_…` beside `prompt`; they are
    empty where the parameters don't ask for them.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    tokens: list[int] = field(default_factory=list)  # generated, without the stop token
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs] = field(default_factory=list)
    reused: int = 0  # of the prompt's tokens, those that its slot held already
    slot: int | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None  # a sentence, where finish_reason is "error"

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def event(self, n: int) -> "Event":
        """What happened when the n-th token came."""
        logprob = self.logprobs[n] if self.params.logprobs else None
        top = self.top_logprobs[n] if self.params.top_logprobs else None
        return Event(self, self.tokens[n], logprob, top)


@dataclass(frozen=True)
class Event:
    """What a step did for one request: a token, or the end (then `finish_reason` is not None)."""

    request: Request
    token: int | None = None
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
