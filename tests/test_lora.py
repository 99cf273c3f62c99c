"""LoRA adapters, against peft's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.errors import CheckpointError
from tests.support import formats, gguf_files
from tests.support.lora import ATTENTION, MLP, train

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
PARAMS |= {"rope_theta": 500000.0}


def build(base: Path, adapter: Path | None) -> Llama:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "adapter": adapter}
    return Llama.build(base, max_seq_len=64, max_batch_size=2, **options)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    formats.write_hf(tmp_path / "hf", PARAMS, formats.random_weights(PARAMS, 400))
    formats.hf_tokenizer(tmp_path / "hf")
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
    model = formats.oracle(formats.random_weights(PARAMS, 400), PARAMS)
    tokens = torch.randint(0, 400, (2, 32))
    plain = formats.logits_of(model, tokens)
    expected = formats.logits_of(train(tmp_path / "adapter", model, **config), tokens)
    assert (expected - plain).abs().max() > 0.01
    logits = build(hf, tmp_path / "adapter").model.forward(tokens, 0)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_on_bases_of_every_format(tmp_path: Path) -> None:
    ranks = formats.tiktoken_ranks(129)
    size = len(ranks) + len(formats.SPECIAL)
    weights = formats.random_weights(PARAMS, size)
    gguf = gguf_files.write_gguf(tmp_path / "m.gguf", PARAMS, weights, gguf_files.byte_level_fields(ranks))
    native = convert(gguf, tmp_path / "native", shards=2)
    expected_model = train(tmp_path / "adapter", formats.oracle(weights, PARAMS))
    tokens = torch.randint(0, size, (2, 32))
    expected = formats.logits_of(expected_model, tokens)
    for base in (gguf, native):
        logits = build(base, tmp_path / "adapter").model.forward(tokens, 0)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    merged = convert(native, tmp_path / "merged", "hf", adapter=tmp_path / "adapter")
    logits = build(merged, None).model.forward(tokens, 0)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_any_part_is_the_part_of_the_whole(hf: Path, tmp_path: Path) -> None:
    train(tmp_path / "adapter", formats.oracle(formats.random_weights(PARAMS, 400), PARAMS))
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
    train(tmp_path / "adapter", formats.oracle(formats.random_weights(PARAMS, 400), PARAMS))
    edit(tmp_path / "adapter" / "adapter_config.json", **change)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(hf, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("change", [{"dim": 128}, {"n_layers": 3}, {"n_kv_heads": 4}])
def test_adapter_for_another_base(change: dict[str, Any], hf: Path, tmp_path: Path) -> None:
    params = {**PARAMS, **change}
    train(tmp_path / "adapter", formats.oracle(formats.random_weights(params, 400), params))
    with pytest.raises(CheckpointError, match="another base"):
        open_checkpoint(hf, adapter=tmp_path / "adapter")


def test_missing_files(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        open_checkpoint(hf, adapter=tmp_path)
    train(tmp_path / "adapter", formats.oracle(formats.random_weights(PARAMS, 400), PARAMS))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        open_checkpoint(hf, adapter=tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pissa", "olora", "OLoRA", "eva", "orthogonal", "gaussian", True, False])
def test_initialisations_that_the_files_tell(kind: Any, hf: Path, tmp_path: Path) -> None:
    """As PEFT itself loads such an adapter onto the base."""
    weights = formats.random_weights(PARAMS, 400)
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "up_proj"]}
    config |= {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    train(tmp_path / "adapter", formats.oracle(weights, PARAMS), **config)
    edit(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=kind)
    adapted = peft.PeftModel.from_pretrained(formats.oracle(weights, PARAMS), tmp_path / "adapter")
    tokens = torch.randint(0, 400, (2, 32))
    expected = formats.logits_of(adapted.merge_and_unload(), tokens)
    logits = build(hf, tmp_path / "adapter").model.forward(tokens, 0)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["corda", "loftq", "pissa_niter_4", "lora_ga", "mica", "something new"])
def test_initialisations_that_changed_the_base_are_refused(kind: str, hf: Path, tmp_path: Path) -> None:
    train(tmp_path / "adapter", formats.oracle(formats.random_weights(PARAMS, 400), PARAMS))
    edit(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=kind)
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{kind}'"):
        open_checkpoint(hf, adapter=tmp_path / "adapter")


def test_adapted_embeddings_do_not_reach_a_tied_output(tmp_path: Path) -> None:
    weights = formats.random_weights(PARAMS, 400)
    del weights["output.weight"]
    formats.write_hf(tmp_path / "hf", PARAMS, weights)
    formats.hf_tokenizer(tmp_path / "hf")
    targets = ["embed_tokens", "q_proj"]
    train(tmp_path / "adapter", formats.oracle(weights, PARAMS), target_modules=targets)
    # Its merge, unlike its forward pass, would change the output layer too.
    adapted = peft.PeftModel.from_pretrained(formats.oracle(weights, PARAMS), tmp_path / "adapter")
    tokens = torch.randint(0, 400, (2, 32))
    logits = build(tmp_path / "hf", tmp_path / "adapter").model.forward(tokens, 0)
    torch.testing.assert_close(logits, formats.logits_of(adapted, tokens), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alpha_pattern": {"(a+)+$": 4}}, "too complex"),
        ({"alpha_pattern": {"[": 4}}, "too complex"),
        ({"alpha_pattern": {"q_proj": "4"}}, "must be a number"),
        ({"lora_alpha": float("nan")}, "must be a number"),
        ({"lora_alpha": None}, "must be a number"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"a_key_of_next_year": True}, "a_key_of_next_year"),
    ],
)
def test_what_a_config_may_say(change: dict[str, Any], match: str, hf: Path, tmp_path: Path) -> None:
    train(tmp_path / "adapter", formats.oracle(formats.random_weights(PARAMS, 400), PARAMS))
    edit(tmp_path / "adapter" / "adapter_config.json", **change)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(hf, adapter=tmp_path / "adapter")
