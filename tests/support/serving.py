"""A server on loopback, in a thread of the tests' own process."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from llama import Guard, Llama
from llama.server.run import Address, Server, create_server
from llama.server.service import Limits
from tests.support.tiny import byte_tokenizer, small_model

NAME = "tiny"


@dataclass
class Served:
    """url: of the server. thread: ends together with the server."""

    server: Server
    url: str
    thread: threading.Thread

    @property
    def busy(self) -> bool:
        """Whether any request is still running or waiting."""
        return bool(self.server.driver.unfinished()) or self.server.driver.llama.engine.has_work()


def tiny_llama(folder: Path, **shape: int) -> Llama:
    """A model with random weights whose tokens are bytes; it accepts tools, described as JSON."""
    tokenizer = byte_tokenizer(folder)
    shape = {"max_batch_size": 4, "max_seq_len": 4096, **shape}
    llama = Llama(small_model(vocab_size=tokenizer.n_words, **shape), tokenizer)
    llama.tool_format = "json"
    return llama


@contextlib.contextmanager
def serving(
    llama: Llama,
    limits: Limits | None = None,
    guard: Guard | None = None,
    log_prompts: bool = False,
    **address: object,
) -> Iterator[Served]:
    """A context with a server for a model, on its own port; on exit, stops it and waits for it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        where, limits = Address(**address), limits or Limits()  # type: ignore[arg-type]
        server = create_server(llama, lambda act: act(), NAME, where, limits, "llama", guard, log_prompts)
        thread = threading.Thread(target=_run, args=(server, listening), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        served = Served(server, url, thread)
        try:
            assert httpx.get(f"{url}/health", timeout=20).status_code == 200
            yield served
        finally:
            server.should_exit = True
            thread.join(20)
        assert not thread.is_alive()


def _run(server: Server, listening: socket.socket) -> None:
    with contextlib.suppress(RuntimeError):  # a test may have broken the engine
        server.run([listening])
