"""What request bodies of several APIs have in common, and how they become the library's arguments."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llama.arguments import Options
from llama.errors import ArgumentError

SAME_NAMES = (
    "temperature",
    "top_p",
    "n",
    "seed",
    "max_tokens",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
)  # here and in `Options`


class Body(BaseModel):
    """A request: types are strict, and unknown fields are rejected."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Loose(BaseModel):
    """A part of a request in which clients may send back irrelevant fields."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Loose):
    include_usage: bool | None = None


class Sampling(Body):
    """Fields that OpenAI's APIs share, and some that only local models have.

    Fields without effect here (user, metadata, store, …) are accepted and ignored.
    """

    model: str
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=0)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=-1, description="Not in OpenAI's API: 0 or -1 keep all tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="Not in OpenAI's API")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Not in OpenAI's API")
    stop_token_ids: list[int] | None = Field(None, description="Not in OpenAI's API")
    user: str | None = Field(None, description="Ignored")
    metadata: dict[str, Any] | None = Field(None, description="Ignored")
    store: bool | None = Field(None, description="Ignored")
    service_tier: str | None = Field(None, description="Ignored")
    safety_identifier: str | None = Field(None, description="Ignored")
    prompt_cache_key: str | None = Field(None, description="Ignored: prefixes are always reused")

    def options(self) -> Options:
        """Convert to arguments of `Llama`."""
        values = {name: getattr(self, name) for name in SAME_NAMES}
        options = {name: value for name, value in values.items() if value is not None}
        if self.top_k is not None and self.top_k > 0:
            options["top_k"] = self.top_k
        if self.stop:
            options["stop"] = self.stop
        if self.logit_bias:
            options["logit_bias"] = {_token(key): bias for key, bias in self.logit_bias.items()}
        return Options(**options)  # type: ignore[typeddict-item]

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(Loose):
    """A part of a message's content, as in OpenAI's and Anthropic's APIs."""

    type: str
    text: str | None = None


Content = str | list[Part] | None


def text_of(content: Content) -> str:
    """The text of a message. Raises ArgumentError for parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if part.type == "refusal":
            continue
        if part.text is None or part.type not in ("text", "input_text", "output_text"):
            raise ArgumentError(f"content has a part of type {part.type!r}, but this model reads text only")
        texts.append(part.text)
    return "".join(texts)


def _token(key: str) -> int:
    if not key.isascii() or not key.isdigit():
        raise ArgumentError(f"logit_bias must have token ids as keys, not {key!r}")
    return int(key)
