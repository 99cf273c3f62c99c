"""Errors, with the shape and status that each API's clients expect."""

import logging
from collections.abc import Callable
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from llama.errors import ArgumentError, LlamaError, MissingPackageError

log = logging.getLogger("llama.server")


class BusyError(LlamaError):
    """The queue is full."""


class DrainingError(LlamaError):
    """The server is shutting down and accepts no new requests."""


class DeadlineError(LlamaError):
    """A request exceeded its time limit."""


class GenerationError(LlamaError):
    """The model failed, not the request."""


class ModelNameError(LlamaError):
    """A request names a model that is not served here."""


class AccessError(LlamaError):
    """A request without a valid API key."""


class TooLargeError(LlamaError):
    """A request's body is too large."""


STATUS: dict[type[Exception], int] = {
    AccessError: 401,
    ModelNameError: 404,
    TooLargeError: 413,
    BusyError: 429,
    MissingPackageError: 501,
    DrainingError: 503,
    DeadlineError: 504,
    GenerationError: 500,
    ArgumentError: 400,
    RequestValidationError: 400,
}


def explain(error: Exception) -> tuple[int, str, str | None]:
    """An error's status, message, and the field that caused it. Logs internal errors."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = [str(part) for part in first["loc"][1:]]
        if first["type"] == "extra_forbidden":
            return 400, f"unknown field {'.'.join(where)!r}", where[-1]
        return 400, f"{'.'.join(where) or 'the body'}: {first['msg']}", ".".join(where) or None
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    if status == 500:
        log.error("request failed", exc_info=error)
        return status, str(error) if isinstance(error, LlamaError) else "internal error", None
    return status, str(error), None


class OpenAIErrorBody(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(TypedDict):
    error: OpenAIErrorBody


class AnthropicErrorBody(TypedDict):
    type: str
    message: str


class AnthropicError(TypedDict):
    type: str
    error: AnthropicErrorBody


CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}


def openai_error(error: Exception) -> tuple[int, OpenAIError]:
    status, message, field = explain(error)
    kind = OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = CODES.get(status) if isinstance(error, LlamaError) else None
    return status, {"error": {"message": message, "type": kind, "param": field, "code": code}}


def anthropic_error(error: Exception) -> tuple[int, AnthropicError]:
    status, message, _ = explain(error)
    kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, {"type": "error", "error": {"type": kind, "message": message}}


def shape_of(path: str) -> Callable[[Exception], tuple[int, Any]]:
    """The format of errors for the clients of a path."""
    return anthropic_error if path.startswith("/v1/messages") else openai_error
