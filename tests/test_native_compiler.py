"""How the compiled step's library is made, found again, and done without."""

import shutil
from pathlib import Path

import pytest

from llama.backends.native.compiler import compiled
from tests.support import tiny

if shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)


def test_compiles_once_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, cache = tmp_path / "step.cpp", tmp_path / "cache"
    source.write_text("int f() { return 1; }")
    cache.mkdir()
    monkeypatch.setattr("llama.backends.native.compiler.SOURCES", [source])
    first = compiled("", cache)
    assert "Compiling" in capfd.readouterr().err
    assert compiled("", cache) == first
    assert capfd.readouterr().err == ""
    assert list(cache.iterdir()) == [first]


def test_a_library_is_found_by_all_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, compiler = tmp_path / "step.cpp", tmp_path / "cxx"
    source.write_text("int f() { return 1; }")
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo $VERSION && exit\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr("llama.backends.native.compiler.SOURCES", [source])
    monkeypatch.setenv("CXX", str(compiler))
    paths = [compiled("", tmp_path), compiled("-O1", tmp_path)]
    source.write_text("int f() { return 2; }")
    paths.append(compiled("", tmp_path))
    monkeypatch.setenv("VERSION", "2")
    paths.append(compiled("", tmp_path))
    monkeypatch.setattr("llama.backends.native.compiler._processor", lambda: "another")
    paths.append(compiled("", tmp_path))
    assert len(set(paths)) == 5


BUILD = """
import sys
from llama import Llama
with Llama.build(sys.argv[1], max_seq_len=64, device="cpu", dtype="float32") as llama:
    print(llama.generate([[1, 2, 3]], 4, 0)[0], llama.model.step_backend is not None)
"""


@pytest.mark.slow
def test_without_a_working_compiler_a_sentence_and_the_other_way(tmp_path: Path, on_ranks) -> None:
    (script := tmp_path / "build.py").write_text(BUILD)
    folder = tiny.write_checkpoint(
        tmp_path / "model", dim=96, n_heads=6, n_kv_heads=2, head_dim=16, multiple_of=32
    )

    def build(**env: str) -> tuple[str, str]:
        done = on_ranks(0, script, folder, env={"LLAMA_CACHE": str(tmp_path / "cache"), **env})
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    working = build()
    assert "True" in working[0] and "Compiling" in working[1]
    assert "Compiling" not in build()[1]
    broken = build(CXX="false")
    assert broken[0] == working[0].replace("True", "False")
    assert "without the compiled step: false failed" in broken[1]
    assert "no C++ compiler was found" in build(PATH="/nowhere")[1]
    (tmp_path / "cache" / "native").chmod(0o777)
    assert "others can write to" in build()[1]
