"""Access control: API keys and the size of request bodies, checked before any other work."""

import asyncio
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.errors import AccessError, DeadlineError, TooLargeError
from llama.server.replies import error_response
from llama.server.service import Limits

OPEN = ("/", "/health", "/health/live", "/health/ready")  # paths that need no key
MOST_READ = 4  # of a body that is too large: times as much as the largest that is accepted


class Access:
    """Middleware that refuses requests without one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or self._has_key(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = AccessError("a valid API key is needed: send Authorization: Bearer KEY or x-api-key: KEY")
        await error_response(scope["path"], error)(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        # All keys are compared, each in constant time, so that timing reveals nothing.
        return sum(hmac.compare_digest(given.encode("latin-1"), key) for key in self.keys) > 0


class BodyLimit:
    """Middleware that refuses bodies that are too large or take too long."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self.limits.timeout)
        except TooLargeError as error:
            await error_response(scope["path"], error)(scope, receive, send)
            return
        except asyncio.TimeoutError:
            await error_response(scope["path"], DeadlineError("the body took too long"))(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes:
        body, size, more = bytearray(), 0, True
        # A body that is too large is read on for a while: a client that is cut off never sees the answer.
        while more and size <= MOST_READ * self.limits.body:
            message = await receive()  # a client that has disconnected sends no more body
            size += len(message.get("body", b""))
            if size <= self.limits.body:
                body += message.get("body", b"")
            more = message.get("more_body", False)
        if size > self.limits.body:
            raise TooLargeError(
                f"the body is larger than {self.limits.body} bytes: send less, or start the server with a "
                "larger --max_body"
            )
        return bytes(body)
