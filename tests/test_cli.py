"""The front door: what a command line may say, and how a mistake is told."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import llama
from llama.cli import COMMANDS, load
from llama.cli.arguments import options_of, parse, usage
from llama.cli.launch import launch
from llama.cli.options import BuildOptions, SamplingOptions
from llama.errors import ArgumentError, CheckpointError
from tests.support import ROOT


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convert {ckpt} new --quantise int4", "unknown argument --quantise; did you mean --quantize?"),
        ("convert {ckpt} new --zzz 1", "unknown argument --zzz; llama convert --help lists the flags"),
        ("convert {ckpt} new more", "unexpected argument 'more' after destination: put the destination in"),
        ("convert {ckpt} new --quantize int3", "quantize must be int8, int5 or int4, not 'int3'"),
        ("convert {ckpt} new --shards", "--shards needs a value: number of weight files"),
        ("convert {ckpt} new --shards --overwrite", "--shards needs a value"),
        ("convert {ckpt} new --shards two", "shards must be a whole number, not 'two'"),
        ("convert {ckpt} new --shards 1 --shards 2", "shards was given twice"),
        ("convert {ckpt}", "destination must be given; see llama convert --help"),
        ("complete {ckpt} Once upon", "unexpected argument 'upon' after prompt: put the prompt in quotes"),
        ("complete {ckpt} x --file y", "pass the prompt or --file, not both"),
        ("complete {ckpt} --file missing", "no file missing to read the prompt from"),
        ("complete {ckpt} x --top_p 2", "top_p must be a number from 0 to 1, not 2.0"),
        ("complete {ckpt} x --temprature=1", "unknown argument --temprature; did you mean --temperature?"),
        ("complete {ckpt} x --logit_bias 3", "logit_bias must be a JSON object, not '3'"),
        ("complete {ckpt} x --compile maybe", "unexpected argument 'maybe' after prompt"),
        ("complete {ckpt} x --device tpu", "device must be cpu, cuda, cuda:N or mps, not 'tpu'"),
        ("complete {ckpt} x --device cuda:99", "device is cuda:99, but PyTorch finds "),
        ("complete {ckpt} x --dtype int8", "dtype must be bfloat16, float16 or float32, not 'int8'"),
        ("complete nowhere x", "no folder nowhere"),
        ("info {ckpt} --max-seq-len=many", "max_seq_len must be a whole number, not 'many'"),
        ("perplexity {ckpt} missing", "[Errno 2] No such file or directory: 'missing'"),
        ("converr a b", "unknown command 'converr'; did you mean convert?"),
        ("xyzzy", "unknown command 'xyzzy'; llama help lists them"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_work(
    command_line, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, error = command_line(*line.format(ckpt=ckpt).split())
    assert (code, out) == (1, "")
    assert error.startswith(f"error: {message}")
    assert sorted(tmp_path.rglob("*")) == before


def test_every_command_that_builds_a_model_has_every_build_flag() -> None:
    build, sampling = ({field.name for field in fields(kind)} for kind in (BuildOptions, SamplingOptions))
    for name in COMMANDS:
        flags = {option.name for option in options_of(load(name))}
        assert build <= flags or name in ("info", "convert"), name
        assert sampling <= flags or name not in ("ask", "chat", "complete"), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag(command_line, name: str) -> None:
    code, out, _ = command_line("help", name)
    assert (code, out) == (0, usage(load(name), f"llama {name}") + "\n")
    assert command_line(name, "--help") == (0, out, "")
    for option in options_of(load(name)):
        assert option.help, option.name
        assert (f"--{option.name}" in out) != option.positional


def test_help_version_and_completion(command_line) -> None:
    for words in ([], ["help"], ["--help"]):
        assert all(f"  {name} " in command_line(*words)[1] for name in COMMANDS)
    assert command_line("--version") == (0, f"{llama.__version__}\n", "")
    code, out, _ = command_line("completion", "bash")
    assert code == 0
    done = subprocess.run(["bash", "-n"], input=out, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--batch-invariant" in out


@dataclass(frozen=True)
class Shared:
    """Shared:

    Args:
        rate: how fast
        stop: where to end
    """

    rate: float = 1.0
    stop: tuple[str, ...] = ()


def command(
    folder: str,
    text: str | None = None,
    *,
    count: int | None = 3,
    loud: bool = False,
    shared: Shared = Shared(),
) -> None:
    """Do it.

    Args:
        folder: where
        text: what,
            and more of it
        count: how often
        loud: or quietly
    """


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["d"], {"folder": "d"}),
        (["d", "12"], {"folder": "d", "text": "12"}),
        (["d", "None"], {"folder": "d", "text": "None"}),
        (["--folder", "d", "t"], {"folder": "d", "text": "t"}),
        (["d", "--text", "None"], {"folder": "d", "text": None}),
        (["d", "--text=--x"], {"folder": "d", "text": "--x"}),
        (["d", "--count", "-2", "--loud"], {"folder": "d", "count": -2, "loud": True}),
        (["d", "--loud", "t", "--count=none"], {"folder": "d", "text": "t", "loud": True, "count": None}),
        (["d", "--loud", "false"], {"folder": "d", "loud": False}),
        (["- a list", "-count", "1"], {"folder": "- a list", "count": 1}),
    ],
)
def test_what_words_mean(words: list[str], expected: dict[str, Any]) -> None:
    assert parse(command, words, "do") == {**expected, "shared": Shared()}


def test_shared_options_arrive_as_one() -> None:
    words = ["d", "--rate", "2", "--stop", '["a", "b"]']
    assert parse(command, words, "do")["shared"] == Shared(2.0, ("a", "b"))
    assert parse(command, ["d", "--stop", "a"], "do")["shared"] == Shared(stop=("a",))
    text = usage(command, "do")
    assert "usage: do FOLDER [TEXT] [--flag value ...]" in text
    assert "what, and more of it" in text
    assert "--rate X                  how fast (default: 1.0)" in text
    with pytest.raises(ArgumentError, match="folder must be given"):
        parse(command, [], "do")


def raising(error: BaseException):
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [CheckpointError("no good"), FileNotFoundError("no good"), PermissionError(13, "no good", "file")],
)
def test_a_users_mistake_is_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"error: .*no good"):
        launch(raising(error), [])
    monkeypatch.setenv("LLAMA_TRACEBACK", "1")
    with pytest.raises(type(error)):
        launch(raising(error), [])


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError(98, "address in use")])
def test_a_fault_of_ours_keeps_its_stack(error: Exception) -> None:
    with pytest.raises(type(error)):
        launch(raising(error), [])


def test_ctrl_c_leaves_quietly() -> None:
    with pytest.raises(SystemExit) as left:
        launch(raising(KeyboardInterrupt()), [])
    assert left.value.code == 130


def test_ctrl_c_during_imports_is_quiet(tmp_path: Path) -> None:
    """A module in torch's place, which takes as long as torch does."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "llama", "info", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_a_conversion(command_line, ckpt: Path, tmp_path: Path) -> None:
    code, out, _ = command_line("convert", ckpt, tmp_path / "new", "--shards", 2)
    assert (code, out) == (0, f"Wrote {tmp_path / 'new'}\n")
    assert len([*(tmp_path / "new").glob("*.pth")]) == 2


def test_complete_from_a_file_and_as_json(command_line, ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("the llama", "utf-8")
    line = ["complete", ckpt, "--max_gen_len", 4, "--temperature", 0, "--max_seq_len", 32, "--dtype", "fp32"]
    _, plain, _ = command_line(*line, "--prompt", "the llama")
    _, from_file, _ = command_line(*line, "--file", tmp_path / "prompt")
    assert from_file == plain
    _, out, _ = command_line(*line, "the llama", "--json")
    answer = json.loads(out)
    assert answer["text"] == plain.removesuffix("\n")
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["new_tokens"] <= 4


def test_ask_answers_once(command_line, demo_ckpt: Path) -> None:
    line = ["ask", demo_ckpt, "What is the capital of France?", "--temperature", 0, "--max_seq_len", 64]
    code, out, _ = command_line(*line)
    assert (code, out) == (0, "The capital of France is Paris.\n")
    _, out, _ = command_line(*line, "--json", "--max_gen_len", 3)
    assert json.loads(out)["finish_reason"] == "length"


def test_a_mistake_leaves_the_signals_of_a_program_alone(command_line):
    before = signal.getsignal(signal.SIGTERM)
    assert command_line("info", "nowhere/at/all")[0] == 1
    assert signal.getsignal(signal.SIGTERM) is before
