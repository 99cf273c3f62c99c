"""A Hugging Face config.json: the model it describes, and what in it this package does not implement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.checkpoint.params import checked, feed_forward
from llama.errors import CheckpointError, shown
from llama.files import check_kinds

# Model types that are Llama in all but name, as long as their config has no feature it lacks.
MODEL_TYPES = ("llama", "mistral", "Yi", "aquila")
# Generation settings, which older configs repeat.
GENERATION = {
    "diversity_penalty", "do_sample", "encoder_no_repeat_ngram_size", "length_penalty", "max_length",
    "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "pruned_heads", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
# Keys that only Llama's own config may omit, because other model types have other defaults: Mistral's are
# a window of 4096 tokens and 8 key heads, Yi's are 4 key heads and a theta of 5,000,000.
EXPLICIT = ("num_key_value_heads", "rope_theta")
# Keys that may have any value, because they concern training or files, or are read elsewhere.
HARMLESS = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "cache_implementation", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "model_type", "pad_token_id",
    "pretraining_tp", "return_dict", "rope_parameters", "rope_scaling", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
    "is_encoder_decoder", "problem_type", *GENERATION,
}  # fmt: skip
# Keys that must have this value if present.
REQUIRED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "is_llama_config": True, "num_experts": 1}
SHAPE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"), (int,)),
    **dict.fromkeys(("num_key_value_heads", "intermediate_size", "head_dim"), (int,)),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), (float,)),
    **{"max_position_embeddings": (int,), "tie_word_embeddings": (bool,), "layer_types": (list,)},
}
READ: dict[str, tuple[type, ...]] = {
    **SHAPE,
    **{"model_type": (str,), "architectures": (list,), "eos_token_id": (int, list)},
    **{"rope_scaling": (dict,), "rope_parameters": (dict,)},
}
ROPE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), (float,)),
    **{"original_max_position_embeddings": (int,), "rope_type": (str,), "type": (str,)},
    "partial_rotary_factor": (float,),
}


def read_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as arguments for `ModelArgs`. Raises CheckpointError for unsupported features."""
    check_kinds(path, config, READ)
    kind = config.get("model_type") or "llama"
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type={shown(kind)} is not supported; supported types: {', '.join(MODEL_TYPES)}"
        )
    given = {**config, **(config.get("rope_parameters") or {})}
    for key in () if kind == "llama" else EXPLICIT:
        if given.get(key) is None:
            raise CheckpointError(
                f"{path} lacks {key}, and the default for model_type={kind!r} differs from Llama's: add it"
            )
    if kind == "mistral" and "sliding_window" not in config:
        raise CheckpointError(
            f"{path} lacks sliding_window, and its default of 4096 tokens is not implemented by this model; "
            'if the model has no sliding window, add "sliding_window": null'
        )
    for key, value in config.items():
        if key in HARMLESS or key in SHAPE or key.startswith("_") or value is None or value is False:
            continue
        if key not in REQUIRED or value != REQUIRED[key]:
            raise CheckpointError(
                f"{path} has {shown(key)[1:-1]}={shown(value)}, which this model does not implement"
            )
    if any(layer != "full_attention" for layer in config.get("layer_types") or ()):
        raise CheckpointError(
            f"{path} has layer_types other than full_attention, which this model does not implement"
        )
    try:
        dim, heads = config["hidden_size"], config["num_attention_heads"]
        params = {
            "dim": dim,
            "n_layers": config["num_hidden_layers"],
            "n_heads": heads,
            "n_kv_heads": heads if (kv := config.get("num_key_value_heads")) is None else kv,
            "vocab_size": config["vocab_size"],
            **feed_forward(path, dim, config["intermediate_size"]),
            "norm_eps": config["rms_norm_eps"],
        }
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]}; download it again") from None
    head_dim = config.get("head_dim")
    if head_dim is not None and (heads is None or head_dim * heads != dim):
        params["head_dim"] = head_dim
    return checked(path, params | read_rope(path, config))


def read_rope(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding of a config.json, in its old (rope_scaling) or new form (rope_parameters)."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if old and new and {**new, **old} != new:
        raise CheckpointError(f"{path} has rope_scaling and rope_parameters that disagree: keep only one")
    rope = {**old, **new}
    check_kinds(path, rope, ROPE)
    own, theta = rope.pop("rope_theta", None), config.get("rope_theta")
    theta = own if own is not None else theta if theta is not None else 10000.0
    kinds = [rope.pop(key, None) for key in ("rope_type", "type")]
    kind = kinds[0] or kinds[1] or "default"
    if rope.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise CheckpointError(f"{path} has partial_rotary_factor, which this model does not implement")
    if kind == "default" and rope.keys() <= ROPE.keys():  # transformers also ignores the other values
        return {"rope_theta": theta}
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{path} has rope_type={shown(kind)}; this model implements default and llama3")
    if unknown := sorted(rope.keys() - ROPE.keys()):
        raise CheckpointError(
            f"{path} has the RoPE parameter {shown(unknown[0])}, which this model does not implement"
        )
    try:
        params = {
            "rope_theta": theta,
            "use_scaled_rope": True,
            "rope_scaling_factor": rope.pop("factor"),
        }
        optional = {
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        for key, default in optional.items():
            if (value := rope.pop(key)) != default:
                params[key] = value
    except KeyError as error:
        raise CheckpointError(f"{path} has rope_type='llama3' without {error.args[0]}") from None
    return params
