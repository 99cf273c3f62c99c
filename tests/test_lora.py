"""LoRA adapters, against peft's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.errors import CheckpointError
from tests import formats_fixtures as tiny

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
PARAMS |= {"rope_theta": 500000.0}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def train(folder: Path, model: Any, **config: Any) -> Any:
    """An adapter of random factors, saved by peft. Returns peft's merged model."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION + MLP, **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.1, generator=generator)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def build(base: Path, adapter: Path | None) -> Llama:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "adapter": adapter}
    return Llama.build(base, max_seq_len=64, max_batch_size=2, **options)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    tiny.write_hf(tmp_path / "hf", PARAMS, tiny.random_weights(PARAMS, 400))
    tiny.hf_tokenizer(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": [*ATTENTION, "lm_head", "embed_tokens"]},
        {"target_modules": MLP, "layers_to_transform": [1], "r": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32, "layers.1.mlp.up_proj": 5}},
    ],
)
def test_logits_are_those_of_peft(config: dict[str, Any], hf: Path, tmp_path: Path) -> None:
    model = tiny.oracle(tiny.random_weights(PARAMS, 400), PARAMS)
    tokens = torch.randint(0, 400, (2, 32))
    plain = tiny.logits_of(model, tokens)
    expected = tiny.logits_of(train(tmp_path / "adapter", model, **config), tokens)
    assert (expected - plain).abs().max() > 0.01
    logits = build(hf, tmp_path / "adapter").model.forward(tokens, 0)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_on_bases_of_every_format(tmp_path: Path) -> None:
    ranks = tiny.tiktoken_ranks(129)
    size = len(ranks) + len(tiny.SPECIAL)
    weights = tiny.random_weights(PARAMS, size)
    gguf = tiny.write_gguf(tmp_path / "m.gguf", PARAMS, weights, tiny.gguf_byte_level(ranks))
    native = convert(gguf, tmp_path / "native", shards=2)
    expected_model = train(tmp_path / "adapter", tiny.oracle(weights, PARAMS))
    tokens = torch.randint(0, size, (2, 32))
    expected = tiny.logits_of(expected_model, tokens)
    for base in (gguf, native):
        logits = build(base, tmp_path / "adapter").model.forward(tokens, 0)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    merged = convert(native, tmp_path / "merged", "hf", adapter=tmp_path / "adapter")
    logits = build(merged, None).model.forward(tokens, 0)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_any_part_is_the_part_of_the_whole(hf: Path, tmp_path: Path) -> None:
    train(tmp_path / "adapter", tiny.oracle(tiny.random_weights(PARAMS, 400), PARAMS))
    source = open_checkpoint(hf, adapter=tmp_path / "adapter").weights
    for name in ("layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight"):
        whole = source.read(name)
        torch.testing.assert_close(source.read(name, 0, (5, 21)), whole[5:21])
        torch.testing.assert_close(source.read(name, 1, (5, 21)), whole[:, 5:21])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_other_kinds_are_refused(change: dict[str, Any], match: str, hf: Path, tmp_path: Path) -> None:
    train(tmp_path / "adapter", tiny.oracle(tiny.random_weights(PARAMS, 400), PARAMS))
    edit(tmp_path / "adapter" / "adapter_config.json", **change)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(hf, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("change", [{"dim": 128}, {"n_layers": 3}, {"n_kv_heads": 4}])
def test_adapter_for_another_base(change: dict[str, Any], hf: Path, tmp_path: Path) -> None:
    params = {**PARAMS, **change}
    train(tmp_path / "adapter", tiny.oracle(tiny.random_weights(params, 400), params))
    with pytest.raises(CheckpointError, match="another base"):
        open_checkpoint(hf, adapter=tmp_path / "adapter")


def test_missing_files(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        open_checkpoint(hf, adapter=tmp_path)
    train(tmp_path / "adapter", tiny.oracle(tiny.random_weights(PARAMS, 400), PARAMS))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        open_checkpoint(hf, adapter=tmp_path / "adapter")
