"""Who may ask, and how much: API keys and the size of a body, looked at before any work."""

import asyncio
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.errors import LlamaError
from llama.server.errors import AccessError, DeadlineError, TooLargeError, shape_of
from llama.server.replies import json_response
from llama.server.service import Limits

OPEN = ("/", "/health", "/health/live", "/health/ready")  # paths that need no key


class Access:
    """Middleware that refuses requests without one of the keys, if there are any, and large bodies."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], limits: Limits) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await asyncio.wait_for(self._body(receive), self.limits.timeout)
        except (LlamaError, TimeoutError) as error:
            known = error if isinstance(error, LlamaError) else DeadlineError("the body took too long")
            status, content = shape_of(scope["path"])(known)
            await json_response(content, status, {"connection": "close"})(scope, receive, send)
            return
        if body is None:
            return  # the client has gone
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        if not self.keys or scope["path"] in OPEN:
            return
        headers = Headers(scope=scope)
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        # All are compared, each in constant time, so that the time tells nothing.
        if not sum(hmac.compare_digest(given.encode("latin-1"), key) for key in self.keys):
            raise AccessError("a valid API key is needed, as Authorization: Bearer KEY or as x-api-key: KEY")

    async def _body(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.limits.body:
                raise TooLargeError(f"the body is larger than {self.limits.body} bytes")
            if not message.get("more_body"):
                return bytes(body)
