"""The command: a process of its own, on one rank and on two."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from llama.cli import main
from tests.server.test_openai import CITY
from tests.support import ROOT, forked
from tests.support.forked import free_port

PATH = "/v1/chat/completions"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "the llama"}], "max_tokens": 16}
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "llama")
SHAPED = {"type": "json_schema", "json_schema": {"name": "trip", "schema": CITY}}


@contextlib.contextmanager
def process(*command: object, scheme: str = "http") -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a process of its own, and its address, once it is ready."""
    port = free_port()
    words = [sys.executable, "-m", *map(str, command), "--port", str(port), "--max_seq_len", "256"]
    server = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    url = f"{scheme}://127.0.0.1:{port}"
    try:
        until_ready(url, lambda: server.poll() is None)
        yield server, url
    finally:
        server.terminate()  # torchrun's ranks have sessions of their own, which only torchrun ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def until_ready(url: str, running: Callable[[], bool]) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/health", verify=False)
            return
        assert running()
        time.sleep(0.1)


@contextlib.contextmanager
def two_ranks(folder: Path, *words: object) -> Iterator[str]:
    """The address of a server on two ranks, once it is ready. folder: for what they print."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = ("-m", "llama", "serve", *words, "--port", port, "--max_seq_len", 256)
    with forked.started(2, folder, *command) as ranks:
        try:
            until_ready(url, lambda: all(rank.is_alive() for rank in ranks))
        except AssertionError:
            pytest.fail("\n".join(file.read_text() for file in sorted(folder.glob("err.*"))))
        yield url


def answers(url: str) -> list[str]:
    """Some requests at once: drawn, constrained, streamed, and one that is given up."""
    bodies = [{**ASK, "seed": seed, "temperature": 1.3} for seed in range(6)]
    bodies += [{**ASK, "seed": 7, "response_format": SHAPED, "max_tokens": 100}]
    found = [""] * len(bodies)

    def ask(i: int) -> None:
        reply = httpx.post(url + PATH, json=bodies[i], timeout=60).json()
        found[i] = reply["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    with httpx.stream(
        "POST", url + PATH, json={**ASK, "stream": True, "max_tokens": 200}, timeout=60
    ) as given_up:
        next(given_up.iter_lines())
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.slow
def test_two_ranks_serve_what_one_does(ckpt: Path) -> None:
    """And told to end, both finish what they have."""
    found = []
    flags = ("serve", ckpt, "--dtype", "float32")
    for command in (("llama", *flags), (*TORCHRUN, *flags)):
        with process(*command) as (server, url):
            found.append(answers(url))
            late = threading.Thread(
                target=lambda url=url: found.append(
                    httpx.post(
                        url + PATH, json={**ASK, "max_tokens": 150, "temperature": 0}, timeout=60
                    ).json()
                )
            )
            late.start()
            while "running 1.0" not in httpx.get(f"{url}/metrics").text:
                assert late.is_alive()
            server.send_signal(signal.SIGTERM)
            late.join(60)
            server.wait(60)
    assert all(found[0])
    assert json.loads(found[0][-1])["city"] in ("Oslo", "Rome")
    assert found[2] == found[0]
    assert found[1]["choices"] == found[3]["choices"]
    assert found[1]["usage"]["completion_tokens"] > 20


@pytest.mark.slow
def test_a_lost_rank_ends_the_server(ckpt: Path) -> None:
    with process(*TORCHRUN, "serve", ckpt, "--dtype", "float32") as (server, _):
        ranks = subprocess.run(
            ["pgrep", "-P", str(server.pid)], capture_output=True, text=True
        ).stdout.split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        _, errors = server.communicate(timeout=60)
        assert server.returncode != 0
        assert errors.count("lost another rank") == 1
        assert "Event loop" not in errors


def test_mistakes_are_told_before_the_model_loads(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "empty").write_text("\n")
    for flags, message in (
        (["--timeout", "0"], "timeout must be more than 0"),
        (["--queue", "-1"], "queue must be a whole number, 0 or more"),
        (["--ssl_certfile", "x"], "TLS needs both"),
        (["--api_key_file", str(tmp_path / "empty")], "contains no API key"),
        (["--api_key_file", str(tmp_path / "none")], "No such file"),
        (["--qeue", "3"], "did you mean --queue"),
    ):
        monkeypatch.setattr(sys, "argv", ["llama", "serve", str(tmp_path / "no model"), *flags])
        with pytest.raises(SystemExit) as left:
            main()
        assert message in str(left.value)
