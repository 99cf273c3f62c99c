"""200 clients of all kinds at once: nothing lost or garbled, nobody held up, nothing left behind."""

import asyncio
import contextlib
import gc
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx
import psutil
import pytest

from llama import Llama
from llama.server.service import Limits
from tests.server.test_faults import until
from tests.server.test_openai import CITY
from tests.support import ROOT
from tests.support.serving import NAME, Served, serving, tiny_llama

CLIENTS = 200
SECONDS = 150.0
PATH = "/v1/chat/completions"
LIMITS = Limits(queue=400, timeout=60, body=100_000)
# A few questions, many times, so that what each is answered alone need be found only once.
QUESTIONS = [f"{word} " * n for word in ("the", "llama 🦙", "über", "x") for n in (1, 7, 60)]
SHAPE = {"type": "json_schema", "json_schema": {"name": "trip", "schema": CITY}}


def ask(number: int) -> dict[str, Any]:
    """One of the requests whose answers are known. Weights are such that rounding decides no token."""
    choice = random.Random(number % 48)
    body: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": choice.choice(QUESTIONS)}],
        "max_tokens": choice.choice((1, 8, 40, 120)),
        "temperature": choice.choice((0, 0.5)),
        "top_k": 5,
        "seed": choice.randrange(100),
    }
    if choice.random() < 0.2:
        body |= {"response_format": SHAPE, "max_tokens": 200}
    return body


class Load:
    """The clients, and what became of their requests.

    expected: of each number of `ask`, the text.
    """

    def __init__(self, url: str, expected: dict[int, str], seconds: float) -> None:
        self.url, self.expected = url, expected
        self.end = time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self) -> None:
        kinds = [self.whole, self.streamed, self.cancelled, self.malformed, self.too_long, self.slow]
        weights = [60, 60, 30, 20, 15, 15]
        clients = [kind for kind, count in zip(kinds, weights, strict=True) for _ in range(count)]
        assert len(clients) == CLIENTS
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(self.client(http, i, kind) for i, kind in enumerate(clients)))

    async def client(self, http: httpx.AsyncClient, number: int, kind: Any) -> None:
        choice = random.Random(number)
        while time.monotonic() < self.end:
            try:
                await kind(http, choice)
                self.seen[kind.__name__] += 1
            except Exception as error:
                self.wrong.append(f"{kind.__name__}: {error!r}")
                return
            await asyncio.sleep(choice.random() / 10)

    def check(self, number: int, text: str) -> None:
        if text != self.expected[number % 48]:
            self.wrong.append(f"{number % 48}: {text!r} instead of {self.expected[number % 48]!r}")

    async def whole(self, http: httpx.AsyncClient, choice: random.Random) -> None:
        reply = await http.post(PATH, json=ask(number := choice.randrange(48)))
        reply.raise_for_status()
        self.check(number, reply.json()["choices"][0]["message"]["content"])

    async def streamed(self, http: httpx.AsyncClient, choice: random.Random) -> None:
        body = {**ask(number := choice.randrange(48)), "stream": True}
        text, ends = "", []
        async with http.stream("POST", PATH, json=body) as reply:
            reply.raise_for_status()
            # Lines with a colon first are comments: pings, while a request waits for its turn.
            lines = [line[6:] async for line in reply.aiter_lines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        for line in lines:
            (piece,) = json.loads(line)["choices"]
            text += piece["delta"].get("content") or ""
            ends += [piece["finish_reason"]] if piece["finish_reason"] else []
        assert len(ends) == 1
        self.check(number, text)

    async def cancelled(self, http: httpx.AsyncClient, choice: random.Random) -> None:
        body = {**ask(choice.randrange(48)), "logit_bias": {"120": 100}, "max_tokens": 2000}
        if choice.random() < 0.5:
            async with http.stream("POST", PATH, json={**body, "stream": True}) as reply:
                reply.raise_for_status()
                lines = reply.aiter_lines()
                for _ in range(choice.randrange(1, 9)):
                    await anext(lines)
        else:
            with contextlib.suppress(httpx.TimeoutException):  # or it was faster
                (await http.post(PATH, json=body, timeout=choice.uniform(0.01, 0.5))).raise_for_status()

    async def malformed(self, http: httpx.AsyncClient, choice: random.Random) -> None:
        body = json.dumps(ask(choice.randrange(48)))
        content = choice.choice(
            (body[: choice.randrange(len(body))], body.replace("temperature", "temprature"), "[]", body + "}")
        )
        reply = await http.post(PATH, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["type"] == "invalid_request_error"

    async def too_long(self, http: httpx.AsyncClient, choice: random.Random) -> None:
        length, status = choice.choice(((5_000, 400), (200_000, 413)))
        body = {"model": NAME, "messages": [{"role": "user", "content": length * "x"}]}
        reply = await http.post(PATH, json=body)
        assert reply.status_code == status, reply.text

    async def slow(self, http: httpx.AsyncClient, choice: random.Random) -> None:
        """A socket of its own with hardly any room, read a little at a time; some give up on the way."""
        body = {**ask(number := choice.randrange(48)), "stream": True}
        content = json.dumps(body).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.setblocking(False)
        host, port = self.url.removeprefix("http://").split(":")
        loop = asyncio.get_running_loop()
        with connection:
            await loop.sock_connect(connection, (host, int(port)))
            head = (
                f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
            )
            await loop.sock_sendall(connection, f"{head}Content-Length: {len(content)}\r\n\r\n".encode())
            for start in range(0, len(content), 50):
                await loop.sock_sendall(connection, content[start : start + 50])
                await asyncio.sleep(0.01)
            received, give_up = b"", choice.random() < 0.3
            while data := await loop.sock_recv(connection, 1024):
                received += data
                if give_up and len(received) > 3000:
                    return
                await asyncio.sleep(0.02)
        text = ""
        for line in received.decode("utf-8", "strict").splitlines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        assert b"data: [DONE]" in received
        self.check(number, text)


def answers(llama: Llama) -> dict[int, str]:
    """What each request gets alone, from the library."""
    found = {}
    for number in range(48):
        body = ask(number)
        options = {name: body[name] for name in ("max_tokens", "temperature", "top_k", "seed")}
        if "response_format" in body:
            options["schema"] = CITY
        (answer,) = llama.chat_completion([body["messages"]], **options)
        found[number] = answer["generation"]["content"]
    return found


def quiet(served: Served) -> bool:
    return not served.busy and not served.server.service.generations


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_two_hundred_clients_of_all_kinds(tmp_path) -> None:
    llama = tiny_llama(tmp_path, max_batch_size=16)
    expected = answers(llama)
    process = psutil.Process()
    with serving(llama, LIMITS) as served:

        def load(seconds: float) -> dict[str, int]:
            # In a process of their own: threads of one would take turns at Python's lock.
            command = [sys.executable, "-m", __name__, served.url, str(seconds)]
            done = subprocess.run(
                command, cwd=ROOT, input=json.dumps(expected), capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            seen, wrong = json.loads(done.stdout)
            assert not wrong, "\n".join(wrong[:20])
            until(lambda: quiet(served), 30)
            gc.collect()
            return seen

        load(SECONDS / 6)  # until caches are full
        before = process.memory_info().rss
        seen = load(SECONDS)
        grown = process.memory_info().rss - before
        print(seen, f"{grown / 2**20:.1f} MiB")
        assert len(seen) == 6
        assert all(slot.free for slot in llama.engine.slots.all)
        assert not llama.engine.waiting
        metrics = httpx.get(f"{served.url}/metrics").text
        assert "llama:num_requests_running 0.0" in metrics
        assert "llama:num_requests_waiting 0.0" in metrics
        assert grown < 32 * 2**20, f"memory has grown by {grown / 2**20:.0f} MiB"
        assert answers(llama) == expected


def main(url: str, seconds: str) -> None:
    expected = {int(number): text for number, text in json.load(sys.stdin).items()}
    load = Load(url, expected, float(seconds))
    asyncio.run(load.run())
    json.dump([load.seen, load.wrong], sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
