"""The example scripts, as the README starts them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, meta_vision, tiny


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


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_the_demo_model_is_the_default_where_it_lies(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "SmolLM2-135M-Instruct")
    done = run("example_text_completion.py", "--max_gen_len", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "SmolLM2-135M-Instruct")
    done = run("example_text_completion.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(
        "error: no checkpoint given, and the demo model is not here. Three ways to get weights:"
    )
    for way in ("./download.sh SmolLM2-135M-Instruct", "signed URL", "on Hugging Face"):
        assert way in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["example_chat_completion.py", "example_text_completion.py"])
def test_quantized_as_told(script: str, tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "tiny")
    done = run(script, "--ckpt_dir", "tiny", "--max_gen_len", "2", "--quantize", "int3", cwd=tmp_path)
    assert done.stderr == "error: quantize must be None or one of int8, int5, int4, fp8, not 'int3'\n"
    done = run(script, "--ckpt_dir", "tiny", "--max_gen_len", "2", "--quantize", "int4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Loaded {folder.name}" in done.stderr and "in int4 on cpu" in done.stderr


def test_a_wrong_folder_is_one_line(tmp_path: Path) -> None:
    done = run("example_chat_completion.py", "--ckpt_dir", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no folder nowhere: give the path of a downloaded checkpoint as ckpt_dir\n"


def test_help_explains_the_flags(tmp_path: Path) -> None:
    done = run("example_chat_completion.py", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "folder of a checkpoint" in done.stdout


@pytest.mark.slow
def test_examples_with_images(tmp_path: Path) -> None:
    folder = meta_vision.write_checkpoint(tmp_path / "vision", meta_vision.random_vision())
    meta_vision.picture(60, 40).save(tmp_path / "a.png")
    done = run("example_vision.py", str(folder), str(tmp_path / "a.png"), "--max_gen_len", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run("example_chat_completion.py", "--ckpt_dir", str(folder), "--max_gen_len", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "User: [an image] Which colors are these?" in done.stdout
    assert done.stdout.count("==================================") == 5
    done = run("example_vision.py", str(folder), "missing.png", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: no image file missing.png" in done.stderr
