"""A server that sends anything at all: nothing of it is executed, printed raw or written elsewhere."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from tests.download.script import MODEL, SHARD, Script, Terminal, refusal
from tests.support.download_server import PAGE, FakeLlamaServer, md5

FILES = ("checklist.chk", "params.json", "tokenizer.model", SHARD, "LICENSE", "USE_POLICY.md")


def payload(canary: Path) -> str:
    """What arithmetic in bash would run."""
    return f"SECONDS[$(>{canary})]"


def chunked(body: bytes, *trailers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", "Content-Type: binary/octet-stream", "Transfer-Encoding: chunked"]
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(body), body)
    tail = "".join(f"{line}\r\n" for line in trailers)
    return "\r\n".join([*lines, "", ""]).encode() + chunk + tail.encode() + b"\r\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "trailer", ["Content-Length: {}", "Content-Range: bytes 0-1/{}", "Content-Range: {}", "HTTP/1.1: {}"]
)
def test_a_trailer_is_never_arithmetic(
    both: Script, server: FakeLlamaServer, weights: bytes, trailer: str
) -> None:
    canary = both.home / "executed"
    server.always[f"{MODEL}/{SHARD}"] = chunked(weights, trailer.format(payload(canary)))
    result = both(MODEL)
    assert not canary.exists()
    assert result.returncode == 0, result.stderr
    assert both.got() == weights


@pytest.mark.slow
@pytest.mark.parametrize("length", ["08", "0x10", "-1", "9" * 30, "SECONDS", "1 + 1", "", "\x1b[31m"])
def test_a_length_that_is_no_number_is_ignored(
    script: Script, server: FakeLlamaServer, weights: bytes, length: str
) -> None:
    server.always[f"{MODEL}/{SHARD}"] = chunked(weights, f"Content-Length: {length}")
    result = script(MODEL)
    assert (result.returncode, result.stderr) == (0, "")
    assert script.got() == weights


def test_a_status_that_is_no_number_is_not_printed(script: Script, server: FakeLlamaServer) -> None:
    server.always[f"{MODEL}/{SHARD}"] = chunked(b"x", "HTTP/1.1: 4\x1b]0;owned\x07")
    assert "owned" not in refusal(script(MODEL), 1)


def test_progress_calculates_with_numbers_only(script: Script, server: FakeLlamaServer) -> None:
    canary = script.home / "executed"
    server.faults[f"{MODEL}/{SHARD}"] = [chunked(b"x" * 5000, f"Content-Length: {payload(canary)}")] * 2
    server.always[f"{MODEL}/{SHARD}"] = ("slow", 2.5)
    terminal = Terminal(script, MODEL)
    terminal.wait_for(SHARD)
    assert terminal.exit_status() in (0, 1)
    assert not canary.exists()


@pytest.mark.parametrize("expires", ["0" * 30, "08", "9" * 40])
def test_the_date_of_a_link_is_a_number(script: Script, server: FakeLlamaServer, expires: str) -> None:
    script.env["PRESIGNED_URL"] = server.link(expires=expires)
    server.always[f"{MODEL}/checklist.chk"] = 403
    result = script(MODEL)
    assert re.search(r"\(403\): it (has expired, is used up|expired \d+ hours ago)", refusal(result, 1))
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize("name", ["LLAMA_RETRY_PAUSE", "LLAMA_STALL_TIMEOUT"])
@pytest.mark.parametrize("value", ["x", "08", "1.5", "a[$(>{canary})]"])
def test_pauses_that_are_no_numbers(script: Script, server: FakeLlamaServer, name: str, value: str) -> None:
    canary = script.home / "executed"
    script.env[name] = value.format(canary=canary)
    assert "must be a whole number" in refusal(script(MODEL), 2)
    assert not canary.exists()


def test_a_redirect_reads_no_file_of_this_machine(both: Script, server: FakeLlamaServer) -> None:
    secret = both.home / "secret"
    secret.write_text("mine")
    answer = f"HTTP/1.1 302 Found\r\nLocation: file://{secret}\r\nContent-Length: 0\r\n\r\n"
    server.always["LICENSE"] = answer.encode()
    assert both(MODEL).returncode == 1
    assert not (both.cwd / MODEL / "LICENSE").exists()


# ---- Fuzzing -------------------------------------------------------------------------------------


class Noise:
    """Answers that are nearly right, with random bytes or what a shell could misread in any place."""

    def __init__(self, seed: int, canary: Path) -> None:
        self.random = random.Random(seed)
        self.words = [
            payload(canary),
            f"x[`>{canary}`]",
            f"$(>{canary})",
            f";>{canary}",
            f"|>{canary}\n>{canary}",
            f"../../{canary.name}",
            *("08", "-1", "0", "9" * 30, "%n%s", "\x1b]0;x\x07", "\\c\\n", "*", "~", "-rf", "!", "(", ""),
        ]

    def word(self) -> bytes:
        if self.random.random() < 0.3:
            return self.random.randbytes(self.random.randrange(40))
        return self.random.choice(self.words).encode()

    def line(self) -> bytes:
        names = "Content-Length: |Content-Range: bytes |Content-Range: bytes 0-1/|content-type: |HTTP/1.1 "
        names += "|HTTP/1.1: |Location: file:///|Location: /|Content-Disposition: |Set-Cookie: |"
        return self.random.choice(names.split("|")).encode() + self.word()

    def body(self, right: bytes) -> bytes:
        checklist = b"\n".join(self.word() + b"  " + name.encode() for name in FILES)
        forged = b"\n".join(md5(self.word()).encode() + b"  " + self.word() for _ in FILES)
        return self.random.choice([right, right, right[:-1], self.word(), checklist, forged, PAGE])

    def answer(self, right: bytes) -> bytes:
        """A whole answer for a file whose content is `right`."""
        flip = self.random.random
        status = self.random.choice([b"200 OK"] * 4 + [b"206 Partial", b"416 No", b"500 No", b"302 Found"])
        lines = [b"HTTP/1.1 " + (status if flip() < 0.9 else self.word())]
        lines += [self.line() for _ in range(self.random.randrange(4))]
        body = self.body(right)
        if flip() < 0.5:
            lines.append(b"Transfer-Encoding: chunked")
            trailers = [self.line() for _ in range(self.random.randrange(1, 4))]
            body = b"%x\r\n%s\r\n0\r\n%s\r\n\r\n" % (len(body), body, b"\r\n".join(trailers))
        elif flip() < 0.5:
            lines.append(b"Content-Length: %d" % len(body))
        return b"\r\n".join([*lines, b"", body])


@pytest.mark.parametrize(
    "runs", [pytest.param(24, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.soak)]
)
def test_nothing_a_server_sends_is_executed_or_written_elsewhere(
    both: Script, server: FakeLlamaServer, runs: int
) -> None:
    canary = both.home / "executed"
    both.stub("sleep", f"exec {shutil.which('sleep')} 0.02")
    both.env["LLAMA_STALL_TIMEOUT"] = "1"
    folder = both.cwd / MODEL
    before = sorted(both.home.rglob("*"))
    for seed in range(runs // 2):
        noise = Noise(seed, canary)
        for name in FILES:
            path = name if name in ("LICENSE", "USE_POLICY.md") else f"{MODEL}/{name}"
            right = server.files[path]
            count = noise.random.choice([0, 0, 0, 1, 3, 14])  # then it is a good server again
            server.faults[path] = [noise.answer(right) for _ in range(count)]
        if seed % 4:
            result = both(MODEL)
            status, shown = result.returncode, result.stdout + result.stderr
            complaints = [line for line in result.stderr.splitlines() if line[:13] != "download.sh: "]
            assert not complaints, seed
            assert not re.search(r"[^\n -~]", shown), seed
        else:
            terminal = Terminal(both, MODEL)
            status, shown = terminal.exit_status(), terminal.screen
            assert not re.search(r"[^\r\n -~]|: line \d", shown.replace("\x1b[K", "")), seed
        assert status in (0, 1), seed
        if status == 0:
            assert all((folder / name).is_file() for name in FILES), seed
        assert not canary.exists(), seed
        assert {path.name.removesuffix(".part") for path in folder.iterdir()} <= set(FILES), seed
        shutil.rmtree(folder)
        assert sorted(both.home.rglob("*")) == before, seed
