"""Every format on several ranks, over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama.checkpoint.convert import convert
from tests.support import formats, gguf_files
from tests.support.lora import train

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
OLD = {**PARAMS, "vocab_size": -1}

SCRIPT = """
import json, os, sys
import torch
from llama import Llama

jobs, tokens, out = json.loads(sys.argv[1]), torch.load(sys.argv[2]), sys.argv[3]
logits = {}
for name, (path, adapter) in jobs.items():
    options = dict(max_seq_len=64, max_batch_size=2, dtype="float32", device="cpu", adapter=adapter)
    llama = Llama.build(path, **options)
    logits[name] = llama.model.forward(tokens, 0)
    assert llama.text_completion(["hello"], max_gen_len=2)
if os.environ["RANK"] == "0":
    torch.save(logits, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_logits_on_ranks(world_size: int, tmp_path: Path, on_ranks) -> None:
    weights = formats.random_weights(OLD, 400)
    model = formats.sentencepiece_model()
    native = formats.write_native(tmp_path / "native", OLD, weights, model, 2)
    gguf = gguf_files.write_gguf(tmp_path / "m.gguf", PARAMS, weights, gguf_files.sentencepiece_fields(model))
    hf = convert(native, tmp_path / "hf", "hf", shards=3)
    merged = train(tmp_path / "adapter", formats.oracle(weights, OLD))
    adapter = str(tmp_path / "adapter")
    tokens = torch.randint(0, 400, (2, 32))
    torch.save(tokens, tmp_path / "tokens")
    plain, adapted = (formats.logits_of(m, tokens) for m in (formats.oracle(weights, OLD), merged))
    jobs = {
        "native": (str(native), None),
        "hf": (str(hf), None),
        "gguf": (str(gguf), None),
        "native adapted": (str(native), adapter),
        "hf adapted": (str(hf), adapter),
        "gguf adapted": (str(gguf), adapter),
    }
    (tmp_path / "script.py").write_text(SCRIPT)
    done = on_ranks(
        world_size, *(tmp_path / "script.py", json.dumps(jobs), tmp_path / "tokens", tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, logits in torch.load(tmp_path / "out").items():
        expected = adapted if "adapted" in name else plain
        torch.testing.assert_close(
            logits, expected, atol=1e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
