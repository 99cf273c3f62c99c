"""The real download.sh in a folder, with a PATH and a server of the test's choosing.

LLAMA_TEST_BASH names another bash to run the script with, for one as old as macOS ships.
"""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.support.download_server import SIGNATURE, FakeLlamaServer

SCRIPT = Path(__file__).parents[2] / "download.sh"
SHARD = "consolidated.00.pth"
MODEL = "Llama-3.2-1B-Instruct"
# Everything that the script may rely on, besides a client and a tool that computes MD5.
TOOLS = "base64 cat cut date du grep head mkdir mktemp mv rm sed sleep stty tr wc"


class Script:
    """The real script, run in a folder of its own with a PATH of our choosing."""

    def __init__(self, home: Path, server: FakeLlamaServer, client: str, hasher: str) -> None:
        self.home = home
        self.server = server
        self.cwd = home / "work"
        self.bin = home / "bin"
        for folder in (self.cwd, self.bin, home / "tmp"):
            folder.mkdir()
        for tool in (*TOOLS.split(), client, hasher):
            self.link(tool)
        self.link("bash", os.environ.get("LLAMA_TEST_BASH", "bash"))
        self.stub("df", 'printf "%s\\n" "Filesystem 1024-blocks" "map disk 9 9 9000000000 1% /"')
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "PRESIGNED_URL": server.link(),
            "TERM": "xterm",
            "LLAMA_RETRY_PAUSE": "0",
        }

    def link(self, tool: str, target: str | None = None) -> None:
        found = shutil.which(target or tool)
        if found is None:
            pytest.skip(f"{tool} is not installed")
        (self.bin / tool).symlink_to(found)

    def stub(self, tool: str, script: str) -> None:
        path = self.bin / tool
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def __call__(self, *args: str, input: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *args],
            cwd=self.cwd,
            env=self.env,
            input=input,
            capture_output=True,
            encoding="latin1",
            timeout=60,
        )

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SCRIPT, *args],
            cwd=self.cwd,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A test runner started in the background passes on that it ignores this signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def processes(self) -> list[tuple[str, str]]:
        """The arguments and the environment of each of this script's processes."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "cwd").samefile(self.cwd):
                    found.append(((process / "cmdline").read_text(), (process / "environ").read_text()))
            except OSError:
                continue
        return found

    def part(self, data: bytes, name: str = SHARD) -> Path:
        """Leave behind what an interrupted run would have left."""
        path = self.cwd / MODEL / f"{name}.part"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    def got(self, name: str = SHARD, model: str = MODEL) -> bytes:
        return (self.cwd / model / name).read_bytes()


class Terminal:
    """The script, run at a terminal."""

    def __init__(self, script: Script, *args: str) -> None:
        pid, self.fd = pty.fork()
        if pid == 0:
            os.chdir(script.cwd)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(SCRIPT, [str(SCRIPT), *args], script.env)
        self.pid = pid
        self.screen = ""

    def read(self) -> bool:
        if not select.select([self.fd], [], [], 0.05)[0]:
            return True
        try:
            data = os.read(self.fd, 4096)
        except OSError:  # the other end is closed
            return False
        self.screen += data.decode("latin1")
        return bool(data)

    def wait_for(self, text: str) -> None:
        wait_for(lambda: self.read() and text in self.screen, f"{text!r} in {self.screen!r}")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_status(self) -> int:
        while self.read():
            pass
        self.echoes = bool(termios.tcgetattr(self.fd)[3] & termios.ECHO)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def wait_for(condition: object, what: str, seconds: float = 10) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def refusal(result: subprocess.CompletedProcess[str], status: int) -> str:
    assert result.returncode == status, result.stdout + result.stderr
    assert SIGNATURE not in result.stdout + result.stderr
    return result.stderr.splitlines()[0]
