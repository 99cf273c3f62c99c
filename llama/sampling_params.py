"""How a request is sampled: the options, under their common names, and their valid ranges."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from llama.errors import ArgumentError

LARGEST = 1e9  # penalty or bias: logits stay distinguishable after adding it in fp64


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises ArgumentError if a value is out of range.

    Applied in this order: repetition_penalty, presence_penalty and frequency_penalty, logit_bias,
    temperature, top_k, top_p, min_p. Logprobs are those of the raw logits, before any of these.

    temperature: divides the logits; 0 picks the most likely token.
    top_p: drop a token if the more likely tokens already sum to more than this probability.
    top_k: keep only the k most likely tokens; top_p then applies to their renormalised probabilities.
    min_p: drop tokens whose probability is below this fraction of the most likely token's.
    repetition_penalty: divides positive and multiplies negative logits of all tokens in the prompt and
      the answer (Keskar et al. 2019, section 4.1); 1 has no effect.
    presence_penalty: subtracted from the logit of each token that occurs in the answer so far.
    frequency_penalty: the same, times the token's number of occurrences in the answer so far.
    logit_bias: added to the logits of these token ids; -inf forbids a token.
    seed: for this request's random draws; any integer.
    max_tokens: maximum number of new tokens; None: as many as the context has room for.
    logprobs: return the log-probabilities of the generated tokens.
    prompt_logprobs: return those of the prompt's tokens too; the first token's is 0.
    top_logprobs: also return the ids and log-probabilities of this many most likely tokens.
    stop_token_ids: ids that end the answer and are not part of it.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    max_tokens: int | None = None
    logprobs: bool = False
    prompt_logprobs: bool = False
    top_logprobs: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        def check(name: str, kind: str, fits: bool) -> None:
            if not fits:
                raise ArgumentError(f"{name} must be {kind}, not {getattr(self, name)!r}")

        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(-1, 0)]
        check("temperature", "0 (greedy) or more", _number(self.temperature, 0, sys.float_info.max))
        check("top_p", "a number from 0 to 1", _number(self.top_p, 0, 1))
        check("top_k", "a whole number, 1 or more, or None", self.top_k is None or _whole(self.top_k, 1))
        check("min_p", "a number from 0 to 1", _number(self.min_p, 0, 1))
        penalty = f"a number from {1 / LARGEST} to {LARGEST} (1 has no effect)"
        check("repetition_penalty", penalty, _number(self.repetition_penalty, 1 / LARGEST))
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, f"a number from {-LARGEST} to {LARGEST}", _number(getattr(self, name)))
        check(
            "logit_bias",
            f"a mapping of token ids to numbers from {-LARGEST} to {LARGEST}, or -inf",
            all(_whole(token, 0) and (value == -math.inf or _number(value)) for token, value in bias),
        )
        check("seed", "a whole number", _whole(self.seed))
        count = "a whole number, 0 or more"
        check("max_tokens", f"{count}, or None", self.max_tokens is None or _whole(self.max_tokens, 0))
        check("top_logprobs", count, _whole(self.top_logprobs, 0))
        for name in ("logprobs", "prompt_logprobs"):
            check(name, "True or False", isinstance(getattr(self, name), bool))
        check("stop_token_ids", "a set of token ids", all(_whole(token) for token in self.stop_token_ids))
        if self.top_logprobs and not self.logprobs:
            raise ArgumentError(f"top_logprobs={self.top_logprobs} needs logprobs=True")

    @property
    def divisor(self) -> float:
        """The temperature, 0 if it is 0, otherwise within limits: in fp32, others would be 0 or infinite."""
        return self.temperature and min(max(self.temperature, 1e-30), 1e30)

    @property
    def adjusts(self) -> bool:
        """Whether the logits change before the temperature is applied."""
        return bool(
            self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        )


Draw = tuple[SamplingParams, int]  # how to draw, and how many tokens the request has drawn before


def _number(value: object, low: float = -LARGEST, high: float = LARGEST) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(value: object, low: float = -math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
