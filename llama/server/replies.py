"""Answers as JSON or as server-sent events, for any API; both end when the client disconnects."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from llama.predictions import Answer
from llama.server.errors import openai_error, shape_of
from llama.server.service import Generation, Service

T = TypeVar("T")

_EVENT = {
    "description": "One event of the stream that a request with stream: true is answered by",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
SSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def service_of(request: Request) -> Service:
    """The service that handles a request, as a FastAPI dependency."""
    service: Service = request.app.state.service
    return service


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def to_json(value: Any) -> bytes:
    """JSON in UTF-8. A client's text may contain lone surrogates, which UTF-8 cannot encode."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def error_response(path: str, error: Exception) -> Response:
    """An error in the format that the clients of a path expect."""
    status, content = shape_of(path)(error)
    headers = {401: {"www-authenticate": "Bearer"}, 413: {"connection": "close"}, 429: {"retry-after": "1"}}
    return json_response(content, status, headers.get(status))


def event(value: Any, name: str | None = None) -> ServerSentEvent:
    """One server-sent event, with a name for Anthropic's API and OpenAI's newer one."""
    return ServerSentEvent(to_json(value).decode(), event=name, sep="\n")


async def whole(
    request: Request, generation: Generation, build: Callable[[Sequence[Answer]], Any]
) -> Response:
    """The result of `build` for all answers, as JSON."""
    async with generation:
        return await finished(request, generation.answers(), build)


async def finished(request: Request, result: Coroutine[Any, Any, T], build: Callable[[T], Any]) -> Response:
    """The result of `build`, as JSON; its work is cancelled if the client disconnects."""
    work = asyncio.ensure_future(result)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return json_response(build(work.result())) if work.done() else Response(status_code=499)
    finally:
        work.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(EventSourceResponse):
    """Server-sent events. An error after the first event is also sent as an event."""

    def __init__(
        self,
        generation: Generation,
        events: AsyncIterator[ServerSentEvent],
        explain: Callable[[Exception], tuple[int, Any]] = openai_error,
        error_name: str | None = None,
    ) -> None:
        """explain: status and body of an error. error_name: of its event."""

        async def guarded() -> AsyncIterator[ServerSentEvent]:
            try:
                async for item in events:
                    yield item
            except Exception as error:
                yield event(explain(error)[1], error_name)

        # On shutdown, running requests are finished; their own time limit applies. It also ends the wait
        # for a client that does not read.
        limit = generation.limits.timeout
        super().__init__(guarded(), sep="\n", shutdown_grace_period=limit, send_timeout=limit)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation:
            await super().__call__(scope, receive, send)
