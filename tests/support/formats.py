"""Tiny random checkpoints in the exact file layout of each family, and their oracles."""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama.model import Transformer
from tests.support.tiny import write_ranks

CORPUS = [
    "The llama and the alpaca are camelids of the Andes.",
    "hello world, this is what a small tokenizer is trained on",
    "numbers 123 4567 and punctuation!? (yes) [no] <<maybe>> it's don't",
    "eine Ähre, l'été, ñandú, 日本語 と 中文, привет мир",
    "system user assistant tool answer question instruction",
] * 4

# Characters that trip up tokenizers, mixed into random texts.
ALPHABET = [
    *("the", " llama", "123", "  ", "\n", "\n\n", "\t", "'s", "don't", " ", " ", ".", "!?", "<s>", "</s>"),
    *(
        "é",
        "ñ",
        "日本",
        "中",
        "🦙",
        "👨‍👩‍👧",
        "́",
        "\u00a0",
        "　",
        "𝕏",
        "١٢",
        "a",
        "Z",
        "_",
        "[INST]",
        "<|eot_id|>",
    ),
    *("<unk>", "<0x41>", "▁", "\r\n", "\x7f", "İ", "ß", "ﬁ", "\u200b", "x" * 30),
]


def random_texts(n: int, seed: int = 0, longest: int = 12) -> list[str]:
    rng = random.Random(seed)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, longest))) for _ in range(n // 2)]
    points = [
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x370, 0x400),
        (0x4E00, 0x4E80),
        (0x1F600, 0x1F640),
        (0x590, 0x600),
    ]
    for _ in range(n - len(texts)):
        low, high = rng.choice(points)
        mixed = (rng.choice([" ", "\n", chr(rng.randrange(low, high))]) for _ in range(rng.randrange(1, 30)))
        texts.append("".join(chr(rng.randrange(low, high)) if rng.random() < 0.6 else c for c in mixed))
    return texts


@functools.cache
def sentencepiece_model(vocab_size: int = 400) -> bytes:
    """A model with the settings that Llama 2's was trained with."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
        pad_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


@functools.cache
def tiktoken_ranks(merges: int = 128) -> dict[bytes, int]:
    """All bytes, then pairs of the corpus's tokens, most frequent first: real but small BPE."""
    ranks = {bytes([i]): i for i in range(256)}
    words = [[bytes([b]) for b in f" {word}".encode()] for text in CORPUS for word in text.split()]
    while len(ranks) < 256 + merges:
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        a, b = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[a + b] = len(ranks)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
    return ranks


def hidden_dim(params: Mapping[str, Any]) -> int:
    hidden = int(8 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    return -(-hidden // params["multiple_of"]) * params["multiple_of"]


def random_weights(
    params: Mapping[str, Any], vocab_size: int, tied: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A whole model's tensors by native name."""
    generator = torch.Generator().manual_seed(7)
    dim, heads = params["dim"], params["n_heads"]
    head_dim = params.get("head_dim", dim // heads)
    q_dim, kv_dim = heads * head_dim, (params.get("n_kv_heads") or heads) * head_dim
    hidden = hidden_dim(params)
    layer = {
        "attention.wq": (q_dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, q_dim),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    shapes = {"tok_embeddings.weight": (vocab_size, dim), "norm.weight": (dim,)}
    if not tied:
        shapes["output.weight"] = (vocab_size, dim)
    for i in range(params["n_layers"]):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {
        name: (torch.randn(shape, generator=generator) * 0.08 + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }


def shard_dim(name: str, old_embeddings: bool) -> int | None:
    if name.endswith("norm.weight"):
        return None
    if name == "tok_embeddings.weight":
        return 1 if old_embeddings else 0
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


def write_native(
    folder: Path,
    params: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: bytes | Mapping[bytes, int],
    shards: int = 1,
    kv_copies: int = 1,
) -> Path:
    """A folder like Meta's downloads. A tokenizer as bytes is sentencepiece's: LLaMA 1 or 2.

    kv_copies: how many shards have the same key and value heads.
    """
    folder.mkdir(parents=True)
    old = isinstance(tokenizer, bytes)
    for number in range(shards):
        shard = {}
        for name, weight in weights.items():
            dim = shard_dim(name, old)
            count, index = shards, number
            if name.endswith(("wk.weight", "wv.weight")):
                count, index = shards // kv_copies, number // kv_copies
            shard[name] = (weight if dim is None else weight.chunk(count, dim)[index]).clone()
        if old:
            shard["rope.freqs"] = torch.zeros(params["dim"] // params["n_heads"] // 2)
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    if isinstance(tokenizer, bytes):
        (folder / "tokenizer.model").write_bytes(tokenizer)
    else:
        write_ranks(folder / "tokenizer.model", tokenizer)
    return folder


def hf_state(weights: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Native tensors with the names and the row order of Hugging Face's implementation."""
    heads = {"wq": params["n_heads"], "wk": params.get("n_kv_heads") or params["n_heads"]}
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    out = {}
    for name, weight in weights.items():
        base = name.removesuffix(".weight")
        layer = ""
        if base.startswith("layers."):
            _, number, base = base.split(".", 2)
            layer = f"model.layers.{number}."
        if n := heads.get(base[-2:]):
            rows, columns = weight.shape
            weight = weight.view(n, rows // n // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        out[f"{layer}{names[base]}.weight"] = weight.contiguous()
    return out


def hf_config(params: Mapping[str, Any], vocab_size: int, tied: bool = False, **more: Any) -> LlamaConfig:
    dim, heads = params["dim"], params["n_heads"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)}
    if params.get("use_scaled_rope"):
        rope |= {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor", 8.0)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    settings = {
        "hidden_size": dim,
        "intermediate_size": hidden_dim(params),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or dim // heads,
        "vocab_size": vocab_size,
        "rms_norm_eps": params["norm_eps"],
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**settings, **more})


def oracle(weights: Mapping[str, Tensor], params: Mapping[str, Any], **more: Any) -> LlamaForCausalLM:
    """transformers' own model with these weights, in fp32."""
    tied = "output.weight" not in weights
    vocab_size = len(weights["tok_embeddings.weight"])
    model = LlamaForCausalLM(hf_config(params, vocab_size, tied, **more)).float().eval()
    missing, unexpected = model.load_state_dict(hf_state(weights, params), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def hf_model(model: Transformer, tied: bool = False) -> LlamaForCausalLM:
    """transformers' own model with the weights of one of ours."""
    state = {name: weight for name, weight in model.state_dict().items() if not (tied and "output" in name)}
    return oracle(state, asdict(model.params), max_position_embeddings=131072)


def logits_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits.float()


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'].strip() }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def hf_tokenizer(folder: Path, **config: Any) -> Any:
    """A byte-level tokenizer trained by `tokenizers`, saved by transformers; returns transformers' own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[4], "chat_template": CHAT_TEMPLATE, **config}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    fast.save_pretrained(folder)
    return fast


def write_hf(folder: Path, params: Mapping[str, Any], weights: Mapping[str, Tensor], **options: Any) -> Any:
    """A folder saved by transformers. Returns its model, in fp32."""
    model = oracle(weights, params)
    model.save_pretrained(folder, **options)
    return model
