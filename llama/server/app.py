"""The HTTP application: its routes and middleware."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from llama.errors import LlamaError
from llama.server import (
    chat_completions,
    completions,
    embeddings,
    messages,
    moderations,
    responses,
    utilities,
)
from llama.server.access import Access, BodyLimit
from llama.server.errors import OpenAIError
from llama.server.logs import Logged
from llama.server.replies import error_response
from llama.server.service import Service
from llama.server.traces import instrument

PAGE = Path(__file__).with_name("page.html").read_text("utf-8")
SCRIPT = hashlib.sha256(PAGE.split("<script>")[1].split("</script>")[0].encode()).digest()
ITSELF_ONLY = (
    f"default-src 'none'; script-src 'sha256-{base64.b64encode(SCRIPT).decode()}'; "
    "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def create_app(service: Service, keys: Sequence[str] = (), origins: Sequence[str] = ()) -> FastAPI:
    """The application that serves a model.

    keys: API keys, one of which every request must send; if empty, every request is served.
    origins: origins of web pages that may call.
    """
    app = FastAPI(
        title="llama",
        summary="A Llama model with OpenAI's and Anthropic's APIs",
        docs_url=None,  # its page would load external scripts
        redoc_url=None,
        responses={"4XX": {"model": OpenAIError}, "5XX": {"model": OpenAIError}},
        dependencies=[Depends(HTTPBearer(auto_error=False))] if keys else [],  # documents the key; see Access
    )
    app.state.service = service
    for module in (chat_completions, completions, responses, messages, embeddings, moderations, utilities):
        app.include_router(module.router)
    for kind in (LlamaError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _explain)

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": ITSELF_ONLY})

    app.add_middleware(BodyLimit, limits=service.limits)
    if keys:
        app.add_middleware(Access, keys=keys)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Logged, service=service)
    instrument(app)
    return app


async def _explain(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, error)
