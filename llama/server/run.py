"""The life of a server process: start, serve, drain, exit; on one rank or many."""

import asyncio
import contextlib
import logging
import math
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn

from llama.generation import Llama
from llama.guard import Guard
from llama.server import logs
from llama.server.app import create_app
from llama.server.driver import Driver, Once
from llama.server.service import Limits, Service, SharedGuard

log = logging.getLogger("llama.server")
LAST_WORDS = 5.0  # seconds for error messages to reach clients after the model has failed


@dataclass(frozen=True)
class Address:
    """Where a server listens, and who may call it. See `create_app` and uvicorn's settings of these names."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Sequence[str] = field(default=(), repr=False)
    origins: Sequence[str] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


class Server(uvicorn.Server):
    """On a first signal, finishes accepted requests and exits; on a second one, exits immediately."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.driver = service.driver

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until signalled to exit. Raises the exception that ended the engine, if any."""
        self.driver.start(self.fail)
        try:
            super().run(sockets)
        finally:
            self.driver.close()
        if self.driver.failure:
            raise self.driver.failure

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
        else:
            self.service.draining = True
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        log.info("draining")
        while self.service.generations:
            await asyncio.sleep(0.02)
        self.should_exit = True

    def fail(self) -> None:
        """Send every client an error and exit, because the model failed. Callable from any thread."""

        def tell() -> None:
            self.service.fail()
            self.should_exit = True
            self._loop.call_later(LAST_WORDS, setattr, self, "force_exit", True)

        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has exited already
            self._loop.call_soon_threadsafe(tell)


def create_server(
    llama: Llama,
    once: Once,
    name: str,
    address: Address,
    limits: Limits,
    prefix: str = "llama",
    guard: Guard | None = None,
    log_prompts: bool = False,
) -> Server:
    """A server on rank 0; its `run` serves until the process is signalled to exit. See `serve`."""
    driver = Driver(llama, once, _jobs(llama, guard))
    shared = guard and (SharedGuard(guard, driver) if llama.model.parallel.size > 1 else guard)
    service = Service(llama, driver, name, limits, prefix, shared, log_prompts)
    config = uvicorn.Config(
        create_app(service, address.keys, address.origins),
        host=address.host,
        port=address.port,
        ssl_certfile=address.ssl_certfile,
        ssl_keyfile=address.ssl_keyfile,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.timeout),
        timeout_keep_alive=75,  # longer than clients keep theirs: who closes last loses a request
    )
    return Server(config, service)


def _jobs(llama: Llama, guard: Guard | None) -> dict[str, Callable[..., Any]]:
    """The functions that ranks call between steps; see `Driver`."""
    return {"embed": llama.embed, **({"check": guard.check} if guard else {})}


def serve(
    llama: Llama,
    once: Once,
    name: str,
    address: Address,
    limits: Limits,
    prefix: str,
    guard: Guard | None = None,
    log_prompts: bool = False,
) -> None:
    """Serve a model until the process is signalled to exit. Ranks other than 0 only compute.

    once: calls a function on rank 0 and broadcasts its result; see `Driver`.
    name: the model's name for clients.
    prefix: of metric names.
    guard: checks what users ask and what the model answers.

    Raises the exception that ended the engine, if any.
    """
    if llama.model.parallel.rank > 0:
        for told in (signal.SIGTERM, signal.SIGINT):
            signal.signal(told, signal.SIG_IGN)  # rank 0 decides when to exit
        Driver(llama, once, _jobs(llama, guard)).follow()
    else:
        logs.configure()
        create_server(llama, once, name, address, limits, prefix, guard, log_prompts).run()
