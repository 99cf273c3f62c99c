"""Further endpoints: models, tokens, health and metrics."""

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response
from typing_extensions import TypedDict

from llama.errors import ArgumentError
from llama.server.bodies import Body, Int
from llama.server.chat_completions import ChatMessage
from llama.server.replies import json_response, service_of
from llama.server.service import Service

router = APIRouter()


class Model(TypedDict):
    """In the form that OpenAI's and Anthropic's clients expect."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    type: Literal["model"]
    display_name: str
    created_at: str


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]
    has_more: bool
    first_id: str
    last_id: str


def _model(service: Service) -> Model:
    created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.created))
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "llama",
        "max_model_len": service.llama.model.params.max_seq_len,
        "type": "model",
        "display_name": service.name,
        "created_at": created_at,
    }


@router.get("/v1/models", tags=["OpenAI", "Anthropic"])
def models(service: Annotated[Service, Depends(service_of)]) -> Models:
    """The model that is served."""
    name = service.name
    return {"object": "list", "data": [_model(service)], "has_more": False, "first_id": name, "last_id": name}


@router.get("/v1/models/{name:path}", tags=["OpenAI", "Anthropic"])
def model(name: str, service: Annotated[Service, Depends(service_of)]) -> Model:
    """The model with this name."""
    service.check_model(name)
    return _model(service)


class TokenizeRequest(Body):
    """A text, or a dialog, which is encoded as in a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class Tokens(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int


@router.post("/tokenize", tags=["Tokens"])
async def tokenize(body: TokenizeRequest, service: Annotated[Service, Depends(service_of)]) -> Tokens:
    """Token ids of a text or a dialog."""
    if (body.prompt is None) == (body.messages is None):
        raise ArgumentError("pass either a prompt or messages")
    if body.prompt is not None:
        encode = service.llama.tokenizer.encode
        ids = await asyncio.to_thread(encode, body.prompt, bos=body.add_special_tokens, eos=False)
    else:
        dialog = [message.plain() for message in body.messages or ()]
        ids = await service.encode(dialog, {"tools": body.tools} if body.tools else {})
    return {"tokens": ids, "count": len(ids), "max_model_len": service.llama.model.params.max_seq_len}


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Int]


class Text(TypedDict):
    prompt: str


@router.post("/detokenize", tags=["Tokens"])
async def detokenize(body: DetokenizeRequest, service: Annotated[Service, Depends(service_of)]) -> Text:
    """The text of token ids."""
    n_words = service.llama.tokenizer.n_words
    if unknown := next((token for token in body.tokens if not 0 <= token < n_words), None):
        raise ArgumentError(f"{unknown} is not a token id: ids run from 0 to {n_words - 1}")
    return {"prompt": await asyncio.to_thread(service.llama.tokenizer.decode, body.tokens)}


class Health(TypedDict):
    status: Literal["ok", "draining", "failed"]


@router.get("/health", tags=["Operation"], response_model=Health)
@router.get("/health/ready", tags=["Operation"], response_model=Health)
def ready(service: Annotated[Service, Depends(service_of)]) -> Response:
    """Whether the server accepts requests; 503 once it is shutting down."""
    return _health(service.status, service.status == "ok")


@router.get("/health/live", tags=["Operation"], response_model=Health)
def live(service: Annotated[Service, Depends(service_of)]) -> Response:
    """Whether the model runs; 503 if it failed."""
    return _health(service.status, service.status != "failed")


def _health(status: str, good: bool) -> Response:
    return json_response({"status": status}, 200 if good else 503)


@router.get("/metrics", tags=["Operation"], response_class=Response)
def metrics(service: Annotated[Service, Depends(service_of)]) -> Response:
    """Counters in Prometheus' format."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
