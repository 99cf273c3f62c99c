"""The measuring command: that it runs, counts right, and writes its trace. Never how fast."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama.cli.bench import bench, bytes_per_step, prefill_flops
from tests.support import tiny
from tests.support.quantized import KEPT, reloaded


@pytest.mark.slow
def test_it_prints_every_figure_and_writes_a_trace(
    ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bench(str(ckpt), batch=2, prompt=8, new=4, runs=1, profile=str(tmp_path / "trace.json"))
    out = capsys.readouterr().out
    for figure in ("load", "time to first token", "prefill", "decode", "memory", "bandwidth", "matrices"):
        assert re.search(rf"^{figure}.* +[\d.]+ ", out, re.MULTILINE), figure
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_the_probes_memory_is_not_counted(ckpt: Path) -> None:
    command = [sys.executable, "-m", "llama", "bench", str(ckpt), "--json"]
    command += ["--prompt", "8", "--new", "4", "--runs", "1"]
    figures = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert 0 < figures["peak_memory"] < 4 * 2**28


def test_bytes_and_operations_are_those_of_the_model() -> None:
    model = tiny.random_model().bfloat16()
    model.allocate_cache()
    linears = sum(w.numel() for name, w in model.named_parameters() if w.dim() == 2 and "tok" not in name)
    norms = 7 * 64
    live = 3 * 2 * 2 * 4 * 10 * 8  # layers, keys and values, sequences, heads, tokens, head_dim
    assert bytes_per_step(model, 2, 10) == 2 * (linears + norms + live)
    kept = reloaded(tiny.random_model(multiple_of=64).bfloat16(), KEPT, "int8")
    kept.allocate_cache()
    linears8 = sum(math.prod(w.shape) for w in tiny.random_model(multiple_of=64).parameters() if w.dim() == 2)
    linears8 -= tiny.VOCAB * 64
    assert bytes_per_step(kept, 2, 10) == linears8 * 34 // 32 + 2 * (norms + live)
    model.output.weight = model.tok_embeddings.weight  # read all the same
    assert bytes_per_step(model, 2, 10) == 2 * (linears + norms + live)
    # One token, nothing to attend to but itself: two operations for each weight.
    assert prefill_flops(model, 1, 1) - 2 * linears == 2 * 3 * 64
    assert prefill_flops(model, 3, 1) == 3 * prefill_flops(model, 1, 1)


def test_refusals_are_sentences(ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch, prompt and runs must be at least 1"):
        bench(str(ckpt), batch=0)
    with pytest.raises(FileNotFoundError, match="no folder"):
        bench(str(ckpt), prompt=4, new=3, runs=1, profile=str(tmp_path / "missing" / "trace.json"))
    assert torch.get_default_dtype() == torch.float32
