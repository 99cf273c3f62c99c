"""Random GGUF files of the llama architecture, and the fields of their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import sentencepiece
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from tests.support.formats import SPECIAL, hidden_dim


def write_gguf(
    path: Path,
    params: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: Mapping[str, Any],
    kind: str = "F32",
    **fields: Any,
) -> Path:
    """A GGUF file of the llama architecture. tokenizer: its fields, without their common prefix."""
    names = {
        "tok_embeddings": "token_embd",
        "norm": "output_norm",
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
        "attention_norm": "attn_norm",
    }
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    head_dim = params.get("head_dim", params["dim"] // params["n_heads"])
    metadata = {
        "llama.embedding_length": params["dim"],
        "llama.block_count": params["n_layers"],
        "llama.attention.head_count": params["n_heads"],
        "llama.attention.head_count_kv": params.get("n_kv_heads", params["n_heads"]),
        "llama.feed_forward_length": hidden_dim(params),
        "llama.context_length": 2048,
        "llama.attention.key_length": head_dim,
        "llama.rope.dimension_count": head_dim,
        **fields,
    }
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", params["norm_eps"])
    writer.add_float32("llama.rope.freq_base", params.get("rope_theta", 10000.0))
    for key, value in tokenizer.items():
        name = f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, weight in weights.items():
        base = name.removesuffix(".weight")
        layer = ""
        if base.startswith("layers."):
            _, number, base = base.split(".", 2)
            layer = f"blk.{number}."
        data = weight.float().numpy()
        which = quantization if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            f"{layer}{names.get(base, base)}.weight", gguf.quantize(data, which), raw_dtype=which
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentencepiece_fields(model: bytes, **more: Any) -> dict[str, Any]:
    """A sentencepiece model as the fields of a GGUF file."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())
    kinds = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in ids
    ]
    return {
        "model": "llama",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }


def byte_level_fields(ranks: Mapping[bytes, int], pre: str = "llama-bpe", **more: Any) -> dict[str, Any]:
    """Byte-pair ranks and the special tokens of Llama 3 as the fields of a GGUF file."""
    # Printable characters represent themselves, the others represent bytes in order.
    spell = {b: chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    others = sorted(set(ByteLevel.alphabet()) - set(spell.values()))
    spell |= dict(zip((b for b in range(256) if b not in spell), others, strict=True))
    text = {token: "".join(spell[b] for b in token) for token in ranks}
    merges = []
    for token in ranks:
        if len(token) > 1:
            # the pair that merging by rank ends with
            parts = [bytes([b]) for b in token]
            while len(parts) > 2:
                at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 10**9))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            if parts[0] in ranks and parts[1] in ranks:
                merges.append(f"{text[parts[0]]} {text[parts[1]]}")
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*text.values(), *SPECIAL],
        "token_type": [1] * len(text) + [3] * len(SPECIAL),
        "merges": merges,
        "bos_token_id": len(text),
        "eos_token_id": len(text) + 4,
        **more,
    }
