"""Servers with the same weights, alternating: tokens per second and time to first token.

Each number of clients runs for the same time; every client sends one streamed chat after another, with
prompts that no server has seen before. Tokens are counted in the received text, with one tokenizer for all.
Every run adds its rounds to any existing results.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from harness import environment, machine, markdown, three_digits, weights
from models import prepare, write_gguf

from llama.checkpoint import open_checkpoint
from llama.tokenizer import TextTokenizer

SLOTS, CONTEXT = 32, 1024  # of each server; a request has one slot and this much context
NEW = 96  # tokens at most
LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port, threads, params.n_parallel, params.n_ctx = map(int, sys.argv[2:])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
time.sleep(1e6)
"""
SERVERS = {  # its package, and its command line
    "this runtime": (
        "fastapi",
        "-m llama serve {folder}/native --port {port} --dtype bfloat16 --device cpu "
        "--max_batch_size {slots} --max_seq_len {context}",
    ),
    "llama.cpp": ("xllamacpp", "-c {script} {folder}/server.gguf {port} {threads} {slots} {total}"),
    "llama-cpp-python[server]": (
        "starlette_context",
        "-m llama_cpp.server --model {folder}/server.gguf --port {port} --n_ctx {context} "
        "--n_threads {threads} --n_threads_batch {threads} --interrupt_requests false --verbose false",
    ),
    "transformers serve": (
        "transformers",
        "-m transformers.cli.transformers serve {folder}/hf --port {port} --device cpu --dtype bfloat16",
    ),
    "transformers serve, continuous batching": (
        "transformers",
        "-m transformers.cli.transformers serve {folder}/hf --port {port} --device cpu --dtype bfloat16 "
        "--continuous-batching --attn-implementation sdpa",
    ),
}
WORDS = (
    "river",
    "stone",
    "lamp",
    "north",
    "garden",
    "copper",
    "sail",
    "winter",
    "market",
    "bridge",
    "silver",
)


@dataclass
class Load:
    """What some clients saw of a server.

    waits: seconds to the first token of each answer. open_waits: of those that have none yet.
    """

    seconds: float
    texts: list[list[str]] = field(default_factory=list)  # the pieces of each answer
    waits: list[float] = field(default_factory=list)
    open_waits: dict[int, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def summary(self, tokenizer: TextTokenizer) -> dict[str, float]:
        tokens = sum(len(tokenizer.encode("".join(text), bos=False, eos=False)) for text in self.texts)
        waits = sorted([*self.waits, *self.open_waits.values()])
        return {
            "tokens_per_second": tokens / self.seconds,
            "first_token": statistics.median(waits),
            "first_token_p95": waits[int(0.95 * (len(waits) - 1))],
            "answers": len(self.waits),
            "without_a_token": len(self.open_waits),
            "failures": len(self.failures),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the weights")
    parser.add_argument("--native", type=Path, help="a native checkpoint in one file")
    parser.add_argument("--servers", nargs="*", default=[*SERVERS], help=f"some of: {'; '.join(SERVERS)}")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=15, help="for each number of clients")
    parser.add_argument("--rounds", type=int, default=1, help="0: only write the table again")
    parser.add_argument("--threads", type=int, help="of each server; by default PyTorch's choice")
    parser.add_argument("--save", type=Path, help="PATH.md and PATH.json; by default FOLDER/server")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = [name for name in options.servers if importlib.util.find_spec(SERVERS[name][0])]
    for name in set(options.servers) - set(names):
        print(f"{name}: skipped because {SERVERS[name][0]} is not installed", file=sys.stderr)
    used = "".join(SERVERS[name][1] for name in names)
    prepare(options.folder, options.native, [], hf="/hf" in used or ".gguf" in used)
    if ".gguf" in used and not (options.folder / "server.gguf").is_file():
        write_gguf(options.folder / "native", options.folder / "server.gguf", options.folder / "hf")
    path = options.save or options.folder / "server"
    file = Path(f"{path}.json")
    results = json.loads(file.read_text("utf-8"))["servers"] if file.is_file() else {}
    tokenizer = open_checkpoint(options.folder / "native").tokenizer
    for number in range(options.rounds):
        for name in names:
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            try:
                with serving(name, options.folder) as url:
                    found = {n: measure(url, n, options.seconds).summary(tokenizer) for n in options.clients}
                results.setdefault(name, []).append(found)
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
    about = (
        f"{weights(options.folder / 'native')}; {machine()}; {options.seconds:g} seconds for each number of "
        f"clients; prompts of about 130 tokens, answers of at most {NEW}; bf16"
    )
    text = f"{table(json.loads(json.dumps(results)))}\n\n{about}.\n"
    print(text)
    Path(f"{path}.md").write_text(text, "utf-8")
    file.write_text(json.dumps({"about": about, "servers": results}, indent=1), "utf-8")


@contextlib.contextmanager
def serving(name: str, folder: Path) -> Iterator[str]:
    """A context with a server in its own process; yields its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {
        "script": LLAMA_CPP,
        "folder": folder.resolve(),
        "port": port,
        "threads": torch.get_num_threads(),
        "slots": SLOTS,
        "context": CONTEXT,
        "total": SLOTS * CONTEXT,
    }
    command = [sys.executable, *(word.format(**values) for word in SERVERS[name][1].split())]
    server = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                # transformers serve lists the hub's cache instead.
                model = str(folder.resolve() / "hf")
                if not name.startswith("transformers"):
                    model = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
                warm = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
                if httpx.post(f"{url}/v1/chat/completions", json=warm, timeout=120).is_success:
                    break
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} does not start: {' '.join(command)}")
            time.sleep(0.2)
        yield f"{url}#{model}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def measure(url: str, clients: int, seconds: float) -> Load:
    """What a number of clients sees of a server during some seconds."""
    load = Load(seconds)
    url, model = url.split("#", 1)

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
            tasks = [asyncio.create_task(client(http, model, load)) for _ in range(clients)]
            await asyncio.wait(tasks, timeout=seconds)
            stopped = time.perf_counter()
            load.open_waits = {key: stopped - began for key, began in load.open_waits.items()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    # No client should find what earlier ones left behind.
    httpx.post(f"{url}/v1/chat/completions", json=question(model, random.Random(), 1), timeout=600)
    return load


def question(model: str, chance: random.Random, new: int) -> dict[str, object]:
    words = " ".join(chance.choices(WORDS, k=90))
    content = f"{words}.\n\nWrite a long story in which all of these words occur in this order."
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": new, "temperature": 0}


async def client(http: httpx.AsyncClient, model: str, load: Load) -> None:
    """One answer after another."""
    chance = random.Random()
    while True:
        began, pieces = time.perf_counter(), list[str]()
        load.texts.append(pieces)
        load.open_waits[id(pieces)] = began
        body = {**question(model, chance, NEW), "stream": True}
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if not response.is_success:
                load.failures.append((await response.aread()).decode())
                del load.open_waits[id(pieces)]
                await asyncio.sleep(0.1)
                continue
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                choices = json.loads(line[6:]).get("choices")
                if choices and (text := choices[0]["delta"].get("content")):
                    if not pieces:
                        load.waits.append(time.perf_counter() - load.open_waits.pop(id(pieces)))
                    pieces.append(text)
        load.open_waits.pop(id(pieces), None)  # an answer without text


def table(results: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Medians over the rounds, for each number of clients."""
    counts = sorted({n for rounds in results.values() for found in rounds for n in found}, key=int)
    head = [
        "server",
        *(f"{n} clients: tok/s" for n in counts),
        *(f"first token, s, {n}" for n in counts),
        "rounds",
    ]
    rows = []
    for name, rounds in results.items():
        row: list[object] = [name]
        for key in ("tokens_per_second", "first_token"):
            for n in counts:
                found = [each[n] for each in rounds if n in each]
                cell = three_digits(statistics.median(each[key] for each in found)) if found else ""
                # If many were still waiting at the end, this is a lower bound.
                late = sum(each["without_a_token"] for each in found)
                many = 10 * late > late + sum(each["answers"] for each in found)
                row.append(f"≥ {cell}" if many and key == "first_token" else cell)
        rows.append([*row, len(rounds)])
    return markdown(head, rows)


if __name__ == "__main__":
    main()
