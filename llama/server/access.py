"""Who may ask: API keys, looked at before anything else of a request."""

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llama.server.errors import AccessError, shape_of
from llama.server.replies import json_response

OPEN = ("/", "/health", "/health/live", "/health/ready")  # paths that need no key


class Access:
    """Middleware that refuses requests without one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or self._has_key(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = AccessError("a valid API key is needed, as Authorization: Bearer KEY or as x-api-key: KEY")
        status, content = shape_of(scope["path"])(error)
        await json_response(content, status, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        # All are compared, each in constant time, so that the time tells nothing.
        return sum(hmac.compare_digest(given.encode("latin-1"), key) for key in self.keys) > 0
