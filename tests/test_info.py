"""What `python -m llama info` tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama import Llama, backends
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.cli.info import as_text, info, inspect, memory
from llama.device import resident_bytes
from llama.model import ModelArgs
from tests.support import formats
from tests.support.quantized import KEPT

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
PARAMS |= {"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 640}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = formats.random_weights(PARAMS, 640, dtype=torch.bfloat16)
    return formats.write_native(tmp_path / "mine", PARAMS, weights, formats.tiktoken_ranks(), 2)


def test_says_all(folder: Path) -> None:
    text = as_text(inspect(folder, max_seq_len=64, max_batch_size=2, dtype="fp32"))
    parameters = sum(w.numel() for w in formats.random_weights(PARAMS, 640).values())
    for part in (
        "Llama 3.1 or 3.3, native format",
        f"{parameters:,}",
        "dim 64, 2 layers, feed-forward 192",
        "theta 500000, scaled by 8",
        "2, bfloat16",
        "tiktoken, 640 tokens",
        "llama3",
        "131,072 tokens",
        "1, 2, 4",
        "max_seq_len 64, max_batch_size 2",
    ):
        assert part in text, part


def test_memory_is_what_a_build_allocates(folder: Path, tmp_path: Path) -> None:
    saved = convert(folder, tmp_path / "saved", quantize="int8")
    for path, scheme in ((folder, None), (folder, "int4"), (saved, "int8")):
        model = Llama.build(path, max_seq_len=64, max_batch_size=2, dtype="bfloat16", quantize=scheme).model
        weights, cache = memory(model.params, 1, open_checkpoint(path).weights, torch.bfloat16, scheme)
        assert 0.95 < resident_bytes(model) / weights <= 1
        assert cache == model.cache.data.nbytes


def test_key_heads_that_repeat_count(folder: Path) -> None:
    args, source = ModelArgs(**PARAMS, max_seq_len=64, max_batch_size=1), open_checkpoint(folder).weights
    caches = [memory(args, size, source, torch.bfloat16)[1] for size in (1, 2, 4)]
    assert caches[0] == 2 * caches[1]
    assert caches[1] == caches[2]  # two key heads on four ranks


def test_quantization(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "plan", lambda *_, **__: KEPT)
    args, source = ModelArgs(**PARAMS), open_checkpoint(folder).weights
    sizes = [memory(args, 1, source, torch.bfloat16, kind)[0] for kind in (None, "int8", "int5", "int4")]
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == 4
    assert "weights int8" in as_text(inspect(folder, quantize="int8"))
    with pytest.raises(ValueError, match="int8, int5, int4"):
        inspect(folder, quantize="int3")


def test_a_quantized_folder_says_so_by_itself(folder: Path, tmp_path: Path) -> None:
    saved = convert(folder, tmp_path / "saved", quantize="int4")
    text = as_text(inspect(saved))
    assert "1, weights int4, others bfloat16" in text
    assert inspect(saved)["memory"] == inspect(folder, quantize="int4")["memory"]
    with pytest.raises(ValueError, match="holds int4 weights, so quantize='int8' is not possible"):
        inspect(saved, quantize="int8")


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info(str(folder), max_seq_len=64, max_batch_size=2, json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["dim"], found["chat_format"], found["stored"]["dtype"]) == (64, "llama3", "bfloat16")
    assert [row["ranks"] for row in found["memory"]] == [1, 2, 4]
