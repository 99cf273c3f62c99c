"""Ranks as `torchrun` starts them, but forked from a process that has imported torch already."""

import contextlib
import itertools
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support import ROOT

_ports = itertools.count(random.randrange(1_000))
_context = multiprocessing.get_context("forkserver")
# What most ranks import; with torchrun, each spends two seconds on them.
_context.set_forkserver_preload(
    ["torch.distributed", "fairscale.nn.model_parallel.initialize", "llama.cli", "llama.generation"]
)


@contextlib.contextmanager
def started(
    size: int, folder: Path, *arguments: object, env: Mapping[str, str] | None = None
) -> Iterator[list[BaseProcess]]:
    """A context in which this many ranks run `python ARGUMENTS`; on exit, they are killed.

    size: 0 is one process that is no rank. folder: for what they print: out.0, err.0, out.1 and so on.
    env: changes to the environment.
    """
    words, env = [str(word) for word in arguments], dict(env or {})
    if size:
        ranks = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": free_port()}
        env |= {name: str(value) for name, value in ranks.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "forked"}
    processes = []
    try:
        for rank in range(size or 1):
            if size:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(target=_run, args=(rank, words, folder, env))
            process.start()
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(
    size: int, folder: Path, *arguments: object, timeout: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` on this many ranks until all have ended, or one fails.

    Returns the exit code of the first to fail, and what all printed.
    """
    end = time.monotonic() + timeout
    with started(size, folder, *arguments, env=env) as ranks:
        while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired([*map(str, arguments)], timeout)
            time.sleep(0.02)
        code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    out, err = (
        "".join((folder / f"{kind}.{i}").read_text() for i in range(len(ranks))) for kind in ("out", "err")
    )
    return subprocess.CompletedProcess([*map(str, arguments)], code, out, err)


def free_port() -> int:
    """A port that stays free: below those that Linux gives out by itself, and this worker's own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 10_000 + worker % 16 * 1_000 + next(_ports) % 1_000
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def _run(rank: int, words: list[str], folder: Path, env: dict[str, str]) -> None:
    import torch

    for file, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), file)
    os.chdir(ROOT)
    os.environ.update(env)
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
