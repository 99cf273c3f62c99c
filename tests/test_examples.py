"""The example scripts, as the README starts them."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.support import ROOT, tiny, vision


@pytest.mark.slow
def test_chat_example_answers(demo_ckpt: Path, torchrun) -> None:
    done = torchrun(
        1,
        "example_chat_completion.py",
        "--ckpt_dir",
        f"{demo_ckpt}/",
        "--temperature",
        0,
        "--max_gen_len",
        16,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "User: What is the capital of France?\n\nAssistant: The capital of France is Paris.\n" in done.stdout
    )


@pytest.mark.slow
def test_flags_of_the_deprecated_repository(ckpt: Path, torchrun) -> None:
    flags = f"--ckpt_dir {ckpt}/ --tokenizer_path {ckpt}/tokenizer.model --max_seq_len 512 --max_batch_size 6"
    for script in ("example_chat_completion.py", "example_text_completion.py"):
        done = torchrun(2, script, *flags.split(), "--temperature", 0.6, "--top_p", 0.9, "--max_gen_len", 4)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("==================================") == 4  # rank 0 alone prints


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a script in this process, in a folder of its own; returns its exit code, output, and errors."""

    def run(script: str, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        code: object = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
        printed = capsys.readouterr()
        return (1, printed.out, code) if isinstance(code, str) else (code, printed.out, printed.err)

    return run


@pytest.mark.slow
def test_the_demo_model_is_the_default_where_it_lies(run, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "SmolLM2-135M-Instruct")
    code, out, error = run("example_text_completion.py", "--max_gen_len", "2")
    assert code == 0, error
    assert out.count("==================================") == 4
    shutil.rmtree(tmp_path / "SmolLM2-135M-Instruct")
    code, out, error = run("example_text_completion.py")
    assert (code, out) == (1, "")
    assert error.startswith(
        "error: no checkpoint given, and the demo model is not here. Three ways to get weights:"
    )
    for way in ("./download.sh SmolLM2-135M-Instruct", "signed URL", "on Hugging Face"):
        assert way in error


@pytest.mark.slow
@pytest.mark.parametrize("script", ["example_chat_completion.py", "example_text_completion.py"])
def test_quantized_as_told(run, script: str, tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "tiny")
    code, _, error = run(script, "--ckpt_dir", "tiny", "--max_gen_len", "2", "--quantize", "int3")
    assert (code, error) == (1, "error: quantize must be None or one of int8, int5, int4, fp8, not 'int3'")
    if "fbgemm" in torch.backends.quantized.supported_engines:
        code, _, error = run(script, "--ckpt_dir", "tiny", "--max_gen_len", "2", "--quantize", "int4")
        assert code == 0, error
        assert f"Loaded {folder.name}" in error and "in int4 on cpu" in error


@pytest.mark.slow
def test_mistakes_are_one_line(run) -> None:
    script = "example_chat_completion.py"
    told = "error: no folder nowhere: pass the path of a downloaded checkpoint as ckpt_dir"
    assert run(script, "--ckpt_dir", "nowhere") == (1, "", told)
    told = "error: unknown argument --temprature; did you mean --temperature?"
    assert run(script, "--temprature", "1") == (1, "", told)


def test_help_explains_the_flags(run) -> None:
    code, out, _ = run("example_chat_completion.py", "--help")
    assert code == 0
    assert "folder of a checkpoint" in out


@pytest.mark.slow
def test_examples_with_images(run, tmp_path: Path) -> None:
    folder = str(vision.write_checkpoint(tmp_path / "vision", vision.random_vision()))
    vision.picture(60, 40).save(tmp_path / "a.png")
    code, out, error = run("example_vision.py", folder, str(tmp_path / "a.png"), "--max_gen_len", "3")
    assert code == 0, error
    code, out, error = run("example_chat_completion.py", "--ckpt_dir", folder, "--max_gen_len", "3")
    assert code == 0, error
    assert "User: [an image] Which colors are these?" in out
    assert out.count("==================================") == 5
    code, _, error = run("example_vision.py", folder, "missing.png")
    assert code == 1
    assert error.endswith("error: no image file missing.png")
