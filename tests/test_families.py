"""Every generation of Llama from native files, with no flags, against transformers' implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama import Llama, ModelArgs
from llama.checkpoint import open_checkpoint
from llama.checkpoint.huggingface import to_hf_rows, to_native_rows
from llama.errors import CheckpointError
from llama.model import rope_frequencies
from tests.support import formats

BASE = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32}
OLD = {**BASE, "vocab_size": -1}
NEW = {**BASE, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 500000.0, "ffn_dim_multiplier": 1.3}
SIXTEEN = {"dim": 128, "n_layers": 1, "n_heads": 16, "n_kv_heads": 8, "multiple_of": 32, "norm_eps": 1e-5}
SCALED = {**NEW, "use_scaled_rope": True}

BASE_MODEL = {"chat_format": "none"}  # what a download of a base model says in format.json

# params.json, shards, further arguments of write_native, dtype, format.json, family, context, chats
FAMILIES = {
    "LLaMA 7B": ({**OLD, "norm_eps": 1e-6}, 1, {}, torch.float16, None, "LLaMA", 2048, False),
    "LLaMA 13B": ({**OLD, "norm_eps": 1e-6}, 2, {}, torch.float16, None, "LLaMA", 2048, False),
    "Llama 2 7B chat": ({**OLD, "norm_eps": 1e-6}, 1, {}, torch.bfloat16, None, "Llama 2", 4096, True),
    "Llama 2 13B": ({**OLD, "norm_eps": 1e-5}, 2, {}, torch.bfloat16, BASE_MODEL, "Llama 2", 4096, False),
    "Llama 2 70B chat": (
        {**OLD, "norm_eps": 1e-5, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3},
        2,
        {},
        torch.bfloat16,
        None,
        "Llama 2",
        4096,
        True,
    ),
    "Llama 3 8B": (NEW, 1, {}, torch.bfloat16, BASE_MODEL, "Llama 3", 8192, False),
    "Llama 3 8B Instruct": (NEW, 1, {}, torch.bfloat16, None, "Llama 3", 8192, True),
    "Llama 3 70B": (NEW, 4, {"kv_copies": 2}, torch.bfloat16, None, "Llama 3", 8192, True),
    "Llama 3.1": (SCALED, 2, {}, torch.bfloat16, None, "Llama 3.1 or 3.3", 131072, True),
    "405B MP8": (
        {**SIXTEEN, "use_scaled_rope": True},
        8,
        {},
        torch.bfloat16,
        None,
        "Llama 3.1 or 3.3",
        131072,
        True,
    ),
    "405B MP16": (
        {**SIXTEEN, "use_scaled_rope": True},
        16,
        {"kv_copies": 2},
        torch.bfloat16,
        None,
        "Llama 3.1 or 3.3",
        131072,
        True,
    ),
    "Llama 3.2 (factor written)": (
        {**SCALED, "rope_scaling_factor": 32.0},
        1,
        {},
        torch.bfloat16,
        None,
        "Llama 3.2",
        131072,
        True,
    ),
}


def make(folder: Path, name: str) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    params, shards, options, dtype, form, *_ = FAMILIES[name]
    tokenizer = formats.sentencepiece_model() if params.get("vocab_size") == -1 else formats.tiktoken_ranks()
    vocab_size = 400 if isinstance(tokenizer, bytes) else len(tokenizer) + 256
    if params.get("vocab_size") != -1:
        params = {**params, "vocab_size": vocab_size}
    weights = formats.random_weights(params, vocab_size, tied=name.startswith("Llama 3.2"), dtype=dtype)
    path = formats.write_native(folder / "mine", params, weights, tokenizer, shards, **options)
    if form:
        (path / "format.json").write_text(json.dumps(form))
    return path, params, weights


@pytest.mark.parametrize("name", FAMILIES)
def test_family_runs_and_is_recognised(name: str, tmp_path: Path) -> None:
    *_, family, context, chats = FAMILIES[name]
    folder, params, weights = make(tmp_path, name)
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=2, dtype="float32", device="cpu")
    tokens = torch.randint(0, len(weights["tok_embeddings.weight"]), (2, 48))
    expected = formats.logits_of(formats.oracle(weights, params), tokens)
    torch.testing.assert_close(llama.model.forward(tokens, 0), expected, atol=1e-4, rtol=0)

    checkpoint = open_checkpoint(folder)
    assert (checkpoint.family, checkpoint.context) == (family, context)
    dialog = [{"role": "user", "content": "hello"}]
    if chats:
        assert llama.chat_completion([dialog], max_gen_len=2)
    else:
        with pytest.raises(ValueError, match=r"base model.*text_completion"):
            llama.chat_completion([dialog], max_gen_len=2)


@pytest.mark.parametrize(("dim", "layers", "heads"), [(2048, 16, 32), (3072, 28, 24), (4096, 32, 32)])
def test_scaling_factor_follows_from_the_released_shapes(dim: int, layers: int, heads: int) -> None:
    params = {"dim": dim, "n_layers": layers, "n_heads": heads, "multiple_of": 256, "norm_eps": 1e-5}
    params |= {"rope_theta": 500000.0, "use_scaled_rope": True}
    factor = 8.0 if dim == 4096 else 32.0
    config = formats.hf_config({**params, "rope_scaling_factor": factor}, 512)
    ours = rope_frequencies(ModelArgs(**params, vocab_size=512))
    torch.testing.assert_close(ours, LlamaRotaryEmbedding(config).inv_freq)


def test_untrained_headers_tell_a_base_model(tmp_path: Path) -> None:
    params = {**NEW, "vocab_size": 640}
    weights = formats.random_weights(params, 640)
    weights["tok_embeddings.weight"][384 + 6] = 0  # <|start_header_id|>
    folder = formats.write_native(tmp_path / "mine", params, weights, formats.tiktoken_ranks())
    with pytest.raises(ValueError, match="base model"):
        open_checkpoint(folder).formatter.encode_dialog_prompt([{"role": "user", "content": "hi"}])


def test_tokenizer_of_llama_2_may_lie_above_the_folder(tmp_path: Path) -> None:
    folder, *_ = make(tmp_path, "Llama 2 13B")
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert open_checkpoint(folder).tokenizer.n_words == 400


def test_longer_than_the_context_warns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, *_ = make(tmp_path, "LLaMA 7B")
    Llama.build(folder, max_seq_len=2048, max_batch_size=1, device="cpu")
    assert "warning" not in capfd.readouterr().err
    Llama.build(folder, max_seq_len=2049, max_batch_size=1, device="cpu")
    assert "max_seq_len=2049 is more than the 2048 tokens" in capfd.readouterr().err


def test_shards_of_two_models_are_refused(tmp_path: Path) -> None:
    folder, *_ = make(tmp_path, "Llama 3.1")
    shard = torch.load(folder / "consolidated.01.pth")
    shard["layers.0.attention.wq.weight"] = torch.zeros(16, 64)
    torch.save(shard, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated.01.pth: layers.0.attention.wq.weight has shape"):
        open_checkpoint(folder)


def test_embeddings_cut_along_two_dimensions_are_refused(tmp_path: Path) -> None:
    folder, _, weights = make(tmp_path, "Llama 2 13B")
    shard = torch.load(folder / "consolidated.01.pth")
    shard["tok_embeddings.weight"] = weights["tok_embeddings.weight"][200:].clone()
    torch.save(shard, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match="a different dimension"):
        open_checkpoint(folder)


def test_wrong_tokenizer_is_refused(tmp_path: Path) -> None:
    folder, *_ = make(tmp_path, "Llama 3 8B")
    (folder / "tokenizer.model").write_bytes(formats.sentencepiece_model())
    with pytest.raises(CheckpointError, match="400 tokens"):
        open_checkpoint(folder)


def test_unknown_parameter_is_named(tmp_path: Path) -> None:
    folder, params, _ = make(tmp_path, "Llama 3 8B")
    (folder / "params.json").write_text(json.dumps({**params, "moe_args": {}}))
    with pytest.raises(CheckpointError, match="moe_args"):
        open_checkpoint(folder)


def test_row_orders_are_inverse() -> None:
    weight = torch.randn(4 * 16, 5)
    assert torch.equal(to_native_rows(to_hf_rows(weight, 16), 16), weight)
    half_split = weight.view(4, 2, 8, 5).transpose(1, 2).reshape(64, 5)
    assert torch.equal(to_native_rows(weight, 16), half_split)
