"""The scripts of benchmarks/: that they run from end to end, and that all engines do the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import ROOT, tiny
from tests.support.quantized import TOKENS, build


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments, "--rounds", 1, "--threads", 1]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_engines_are_compared(ckpt: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    names = ["this runtime, bf16", "this runtime, int8", "transformers, bf16", "python -m llama chat"]
    save = tmp_path / "pictures" / "tiny"
    sizes = ["--prompt", 16, "--long", 64, "--new", 4, "--settle", 0]
    done = run("run.py", tmp_path, "--native", ckpt, *sizes, "--save", save, "--engines", *names)
    assert done.returncode == 0, done.stderr
    for name in names[:3]:
        assert done.stdout.count(f"| {name} |") == (
            2 if name.startswith("transformers") else 1
        )  # and its ratios
    assert "`python -m llama chat`, from start to end" in done.stdout
    results = json.loads(Path(f"{save}.json").read_text())
    for (run_,) in results["engines"].values():
        assert all(value > 0 for value in run_.values())
    assert Path(f"{save}.md").read_text() in done.stdout
    assert Path(f"{save}.png").stat().st_size < 150_000


@pytest.mark.soak
def test_curves_are_drawn(ckpt: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kinds = ["decode", "context", "prefill"]
    done = run("curves.py", tmp_path, "--native", ckpt, "--longest", 512, "--only", *kinds)
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "curves.json").read_text())["curves"]
    assert [place for place, _, _ in curves["decode, tok/s"]] == [1, 2, 4, 8, 16, 32]
    assert (tmp_path / "curves.png").stat().st_size < 150_000


@pytest.mark.soak
def test_servers_are_compared(ckpt: Path, tmp_path: Path) -> None:
    options = ["--native", ckpt, "--servers", "this runtime", "--clients", 1, 3, "--seconds", 2]
    for _ in range(2):  # rounds add up
        done = run("server.py", tmp_path, *options)
        assert done.returncode == 0, done.stderr
    rounds = json.loads((tmp_path / "server.json").read_text())["servers"]["this runtime"]
    assert len(rounds) == 2
    for found in (clients for each in rounds for clients in each.values()):
        assert found["tokens_per_second"] > 0
        assert found["answers"] >= 3
        assert found["failures"] == 0
    assert (tmp_path / "server.md").read_text() in done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "transformers, bf16",
        pytest.param("transformers, bf16, static cache, compiled", marks=pytest.mark.slow),
        "llama.cpp, bf16",
    ],
)
def test_peers_generate_the_same_tokens(
    name: str, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from engines import ENGINES
    from models import prepare

    open_engine, module, arguments = ENGINES[name]
    pytest.importorskip(module)
    prepare(tmp_path, ckpt, ["bf16"] if "file" in arguments else [])
    prompts = [torch.randint(100, tiny.VOCAB - 300, (length,)).tolist() for length in (3, 17, 40)]
    ticks: list[None] = []
    expected = ENGINES["this runtime, bf16"][0](tmp_path, 64, 4)(prompts, 8, lambda: ticks.append(None))
    assert len(ticks) == 8
    generated = open_engine(tmp_path, 64, 4, **arguments)(prompts, 8, lambda: ticks.append(None))
    assert len(ticks) == 16
    assert generated == expected


def test_a_permuted_model_is_equivalent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from quality import permute

    source, permuted = tiny.write_checkpoint(tmp_path / "source"), tmp_path / "permuted"
    permute(source, permuted)
    models = [build(folder).model for folder in (source, permuted)]
    torch.testing.assert_close(models[0](TOKENS, 0), models[1](TOKENS, 0), rtol=1e-4, atol=1e-4)
    before, after = (torch.load(folder / "consolidated.00.pth") for folder in (source, permuted))
    assert not any(torch.equal(before[name], after[name]) for name in before)
