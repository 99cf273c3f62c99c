"""OpenAI's embeddings: https://platform.openai.com/docs/api-reference/embeddings."""

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from llama.errors import ArgumentError
from llama.server.bodies import WHOLE, Body, Int
from llama.server.replies import finished, service_of
from llama.server.service import Service

router = APIRouter(tags=["OpenAI"])

MOST_TEXTS = 2048  # OpenAI's limit


class EmbeddingsRequest(Body):
    model: str
    input: str | list[str] | list[Int] | list[list[Int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        None, description="Rejected unless it is the model's own"
    )
    pooling: Literal["mean", "last", "cls"] = Field(
        "mean", description="Not in OpenAI's API; see `Llama.embed`"
    )
    user: str | None = Field(None, description="Ignored")

    def texts(self) -> Sequence[str | list[int]]:
        """The list of texts or ids. Raises ArgumentError if it is empty or too long."""
        one = isinstance(self.input, str) or (self.input and isinstance(self.input[0], int))
        texts = [self.input] if one else self.input
        if not 0 < len(texts) <= MOST_TEXTS:
            raise ArgumentError(f"input has {len(texts)} texts; pass 1 to {MOST_TEXTS}")
        return texts  # type: ignore[return-value]


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


@router.post("/v1/embeddings", response_model=EmbeddingList)
async def embeddings(
    body: EmbeddingsRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """One vector of length 1 per text. Ids are used unchanged; texts get the begin-of-text token."""
    service.check_model(body.model)
    dim = service.llama.model.params.dim
    if body.dimensions not in (None, dim):
        raise ArgumentError(f"this model's vectors have {dim} dimensions, not {body.dimensions}")

    def build(found: tuple[list[list[float]], int]) -> EmbeddingList:
        vectors, count = found
        encode = _base64 if body.encoding_format == "base64" else list
        data: list[Embedding] = [
            {"object": "embedding", "index": i, "embedding": encode(vector)}
            for i, vector in enumerate(vectors)
        ]
        usage: Usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": service.name, "usage": usage}

    return await finished(request, service.embed(body.texts(), body.pooling), build)


def _base64(vector: Sequence[float]) -> str:
    """In OpenAI's encoding: little-endian fp32."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
