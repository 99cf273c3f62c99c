"""What request bodies of several APIs have in common, and how they become the library's arguments."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
    "regex",
    "grammar",
)  # here and in `Options`


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # JSON does not tell 1.0 from 1; stands last, so that bounds are documented
Int = Annotated[int, WHOLE]


class Body(BaseModel):
    """A request: types are strict, and unknown fields are rejected."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Loose(BaseModel):
    """A part of a request in which clients may send back irrelevant fields."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Loose):
    include_usage: bool | None = None


class JsonSchema(Loose):
    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(Loose):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def shape(self) -> Options:
        """Convert to the library's arguments. Raises ArgumentError if the schema is missing."""
        if self.type == "text":
            return {}
        if self.type == "json_object":
            return {"schema": {"type": "object"}}
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise ArgumentError("response_format of type json_schema needs json_schema with a schema")
        return {"schema": self.json_schema.schema_}


class Sampling(Body):
    """Fields that OpenAI's APIs share, and some that only local models have.

    Fields without effect here (user, metadata, store, …) are accepted and ignored.
    """

    model: str
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1), WHOLE] | None = Field(
        None, description="Not in OpenAI's API: 0 or -1 keep all tokens"
    )
    min_p: float | None = Field(None, ge=0, le=1, description="Not in OpenAI's API")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Not in OpenAI's API")
    stop_token_ids: list[Int] | None = Field(None, description="Not in OpenAI's API")
    response_format: ResponseFormat | None = None
    regex: str | None = Field(None, description="Not in OpenAI's API: must match the whole answer")
    grammar: str | None = Field(None, description="Not in OpenAI's API: a grammar in Lark syntax")
    user: str | None = Field(None, description="Ignored")
    metadata: dict[str, Any] | None = Field(None, description="Ignored")
    store: bool | None = Field(None, description="Ignored")
    service_tier: str | None = Field(None, description="Ignored")
    safety_identifier: str | None = Field(None, description="Ignored")
    prompt_cache_key: str | None = Field(None, description="Ignored: prefixes are always reused")

    def options(self) -> Options:
        """Convert to arguments of `Llama`. Raises ArgumentError for invalid ones."""
        values = {name: getattr(self, name) for name in SAME_NAMES}
        options = {name: value for name, value in values.items() if value is not None}
        if self.top_k is not None and self.top_k > 0:
            options["top_k"] = self.top_k
        if self.stop:
            options["stop"] = self.stop
        if self.logit_bias:
            options["logit_bias"] = {_token(key): bias for key, bias in self.logit_bias.items()}
        if self.response_format:
            options.update(self.response_format.shape())
        return Options(**options)  # type: ignore[typeddict-item]

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ImageUrl(Loose):
    url: str


class Part(Loose):
    """A part of a message's content, as in OpenAI's APIs."""

    type: str
    text: str | None = None
    image_url: str | ImageUrl | None = Field(None, description="A data URL; nothing is fetched")


Content = str | list[Part] | None


def content_of(content: Content) -> str | list[dict[str, Any]]:
    """Convert to the library's content. Raises ArgumentError for parts other than text and images."""
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.type in ("image_url", "input_image"):
            url = part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url
            parts.append(image_part(url))
        elif part.type != "refusal":
            parts.append({"type": "text", "text": _text(part)})
    return parts


def text_of(content: Content) -> str:
    """The text of a message. Raises ArgumentError for parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_text(part) for part in content if part.type != "refusal")


def image_part(url: str | None) -> dict[str, Any]:
    """Convert to the library's image part. Raises ArgumentError for anything other than a data URL."""
    if url is None or not url.startswith("data:"):
        raise ArgumentError("an image must be a data URL (data:image/png;base64,…): nothing is fetched")
    return {"type": "image_url", "image_url": {"url": url}}


def _text(part: Part) -> str:
    if part.text is None or part.type not in ("text", "input_text", "output_text"):
        raise ArgumentError(f"content has a part of type {part.type!r}, which is not supported")
    return part.text


def _token(key: str) -> int:
    if not key.isascii() or not key.isdigit():
        raise ArgumentError(f"logit_bias must have token ids as keys, not {key!r}")
    return int(key)
