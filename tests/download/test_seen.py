"""What download.sh shows, on a terminal and without one, and what nobody may see."""

from __future__ import annotations

import re

import pytest

from tests.download.script import MODEL, SHARD, Script, Terminal, wait_for
from tests.support.download_server import SIGNATURE, FakeLlamaServer

pytestmark = pytest.mark.slow


def test_the_signature_is_nowhere(both: Script, server: FakeLlamaServer) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [("slow", 1), 500]
    process = both.start(MODEL)
    part = both.cwd / MODEL / f"{SHARD}.part"
    wait_for(lambda: part.exists() and part.stat().st_size, "the first half")
    processes = both.processes()
    files = [path for path in both.home.rglob("*") if path.is_file()]
    written = [path for path in files if SIGNATURE.encode() in path.read_bytes()]
    output, _ = process.communicate(timeout=60)
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
    terminal.wait_for("run the same command to resume")
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
