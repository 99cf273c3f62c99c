"""JSON log lines, one per request, with an id that links a request's lines and its response."""

import json
import logging
import re
import sys
import time
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.replies import error_response, new_id
from llama.server.service import Service

log = logging.getLogger("llama.server")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
GIVEN_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class JsonLines(logging.Formatter):
    """A record as one line of JSON; fields logged with `extra={"fields": …}` are next to the message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **({"request_id": found} if (found := request_id.get()) else {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: int = logging.INFO) -> None:
    """Write this server's and uvicorn's records to standard error, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("llama.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == "llama.server" else logging.WARNING)


class Logged:
    """Middleware: gives each request an id, the client's own if sent, and logs a line at its end."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.metrics = service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if GIVEN_ID.fullmatch(given) else new_id("req_")
        request_id.set(name)
        began, status = time.perf_counter(), 499  # 499 unless there is a response

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:  # an internal error
            response = error_response(scope["path"], error)
            if status == 499:
                await response(scope, receive, send_with_id)
        finally:
            # An unknown path may be anything, so it must not become a label.
            handler = getattr(scope.get("route"), "path", "none")
            self.metrics.http.labels(scope["method"], handler, str(status)).inc()
            fields = {"method": scope["method"], "path": scope["path"], "status": status}
            log.info(
                "request", extra={"fields": {**fields, "seconds": round(time.perf_counter() - began, 4)}}
            )
