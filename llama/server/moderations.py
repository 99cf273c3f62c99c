"""OpenAI's moderations, with a Llama Guard: https://platform.openai.com/docs/api-reference/moderations."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from llama.errors import ArgumentError
from llama.guard import Verdict
from llama.guard.prompt import GuardVersion, category_name
from llama.server.bodies import Body, Part, content_of
from llama.server.replies import finished, new_id, service_of
from llama.server.service import Service
from llama.tokenizer import Dialog

router = APIRouter(tags=["OpenAI"])

MOST_TEXTS = 256


class ModerationsRequest(Body):
    input: str | list[str] | list[Part]
    model: str | None = Field(None, description="Ignored: there is one guard")

    def dialogs(self) -> list[Dialog]:
        """What the guard is shown. Raises ArgumentError for input that it does not accept."""
        if isinstance(self.input, str):
            return [[{"role": "user", "content": self.input}]]
        if not 0 < len(self.input) <= MOST_TEXTS:
            raise ArgumentError(f"input has {len(self.input)} entries; pass 1 to {MOST_TEXTS}")
        if isinstance(self.input[0], str):
            return [[{"role": "user", "content": text}] for text in self.input]
        return [[{"role": "user", "content": content_of(self.input)}]]


class Result(TypedDict):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


class Moderation(TypedDict):
    id: str
    model: str
    results: list[Result]


@router.post("/v1/moderations", response_model=Moderation)
async def moderations(
    body: ModerationsRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """The guard's verdict on each text, as a user's message.

    The categories are those of the guard's version. It returns one probability for the whole text, which is
    used as the score of every category it names.
    """

    def build(verdicts: Sequence[Verdict]) -> Moderation:
        assert service.guard is not None
        version = service.guard.version
        images = any(isinstance(part, Part) and part.type == "image_url" for part in body.input)
        types = ["text", "image"] if images else ["text"]
        results = [_result(version, verdict, types) for verdict in verdicts]
        return {"id": new_id("modr-"), "model": f"llama-guard-{version.name}", "results": results}

    return await finished(request, service.moderate(body.dialogs()), build)


def _result(version: GuardVersion, verdict: Verdict, types: list[str]) -> Result:
    named = {category.name for category in verdict.categories}
    known = map(category_name, version.categories.values())
    names = [*dict.fromkeys([*known, *sorted(named)])]  # a guard may make up one
    return {
        "flagged": not verdict.safe,
        "categories": {name: name in named for name in names},
        "category_scores": {name: verdict.unsafe_probability if name in named else 0.0 for name in names},
        "category_applied_input_types": dict.fromkeys(names, types),
    }
