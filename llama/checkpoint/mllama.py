"""Hugging Face's form of Llama 3.2 Vision, called Mllama: configuration, names and tensors.

There, cross-attention blocks are numbered among the other layers, the image token's embedding follows
those of text, and tensors that depend on a tile's position are stored once per canvas: row i of a table
has the tiles of the i-th canvas concatenated; row 0 is empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.hf_config import read_config
from llama.checkpoint.huggingface import HFWeights, hf_name, open_huggingface
from llama.checkpoint.params import checked
from llama.checkpoint.source import Checkpoint
from llama.errors import CheckpointError, shown
from llama.files import check_kinds
from llama.parallel import Span
from llama.quantization import EMBEDDINGS, LEARNABLE
from llama.vision import VisionArgs

ENCODER = "vision_model.vision_encoder."
# For the encoder: parts of native names, and their names here.
PARTS = {
    "conv1._linear.weight": "patch_embedding.weight",
    "gated_positional_embedding_gate": "gated_positional_embedding.gate",
    "gated_positional_embedding": "gated_positional_embedding.tile_embedding.weight",
    "positional_embedding": "gated_positional_embedding.embedding",
    "pre_tile_pos_embed.embedding": "pre_tile_positional_embedding.embedding.weight",
    "post_tile_pos_embed.embedding": "post_tile_positional_embedding.embedding.weight",
    "pre_tile_pos_embed.gate": "pre_tile_positional_embedding.gate",
    "post_tile_pos_embed.gate": "post_tile_positional_embedding.gate",
}
BLOCK = {
    "resblocks": "layers",
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "ln_pre": "layernorm_pre",
    "ln_post": "layernorm_post",
}
CROSS = {
    "attention.q_norm.weight": "cross_attn.q_norm.weight",
    "attention.k_norm.weight": "cross_attn.k_norm.weight",
    "gate_attn": "cross_attn_attn_gate",
    "gate_ffwd": "cross_attn_mlp_gate",
}
# Since version 4.52, `transformers` uses other names in memory, and some files have these too.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
TABLES = ("gated_positional_embedding", "pre_tile_pos_embed.embedding", "post_tile_pos_embed.embedding")
# Keys that the two parts of a config.json may have besides shapes, and required values of some.
VISION_CONFIG = {
    "hidden_act": "gelu", "num_channels": 3, "norm_eps": 1e-5, "patch_size": 14,
    "model_type": "mllama_vision_model",
}  # fmt: skip
VISION_SHAPE = {
    "image_size": "vision_chunk_size",
    "max_num_tiles": "vision_max_num_chunks",
    "hidden_size": "vision_dim",
    "attention_heads": "vision_heads",
    "num_hidden_layers": "vision_layers",
    "num_global_layers": "vision_global_layers",
    "intermediate_layers_indices": "vision_taps",
}


def open_mllama(folder: Path, tokenizer_path: Path | None = None) -> Checkpoint:
    """Like `open_huggingface`, for a vision model."""
    return open_huggingface(folder, tokenizer_path, mllama_params, MllamaWeights)


def mllama_params(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as arguments for `VisionArgs`. Raises CheckpointError for unsupported features."""
    check_kinds(path, config, {"text_config": (dict,), "vision_config": (dict,), "image_token_index": (int,)})
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    kinds = dict.fromkeys(VISION_SHAPE, (int,)) | {"intermediate_layers_indices": (list,)}
    check_kinds(path, vision, kinds | {"intermediate_size": (int,)})
    cross = text.get("cross_attention_layers")
    if not isinstance(cross, list) or not vision:
        raise CheckpointError(f"{path} has no vision_config or no cross_attention_layers; download it again")
    for key, value in VISION_CONFIG.items():
        if vision.get(key, value) != value:
            raise CheckpointError(
                f"{path} has {key}={shown(vision[key])} in its vision_config; only {value!r} is supported"
            )
    others = {"cross_attention_layers", "dropout", "model_type"}
    params = read_config(path, {key: value for key, value in text.items() if key not in others})
    params["n_layers"] -= len(cross)
    params["vision_num_cross_attention_layers"] = len(cross)
    usual = {name: VisionArgs.__dataclass_fields__[name].default for name in VISION_SHAPE.values()}
    for key, name in VISION_SHAPE.items():
        value = vision.get(key)
        if value is None:
            raise CheckpointError(f"{path} has no {key} in its vision_config; download it again")
        value = tuple(value) if name == "vision_taps" else value
        # params.json of Meta's models omits the encoder's shape.
        if name in ("vision_chunk_size", "vision_max_num_chunks") or value != usual[name]:
            params[name] = value
    args = VisionArgs(**checked(path, params))
    if cross != [layer + i for i, layer in enumerate(args.fusion)]:
        raise CheckpointError(
            f"{path} has cross_attention_layers={shown(cross)}; only evenly spaced ones are supported"
        )
    if vision.get("intermediate_size", 4 * args.vision_dim) != 4 * args.vision_dim:
        raise CheckpointError(f"{path} has a vision_config whose intermediate_size is not 4 · hidden_size")
    if config.get("image_token_index", args.vocab_size) != args.vocab_size:
        raise CheckpointError(f"{path} has an image_token_index other than vocab_size={args.vocab_size}")
    return params


def mllama_config(args: VisionArgs, text: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, from that of the text model."""
    shape = {key: getattr(args, name) for key, name in VISION_SHAPE.items()}
    cross = [layer + i for i, layer in enumerate(args.fusion)]
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": args.vocab_size,
        "torch_dtype": text["torch_dtype"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {
            **{key: value for key, value in text.items() if key != "architectures"},
            "model_type": "mllama_text_model",
            "num_hidden_layers": args.n_layers + len(cross),
            "cross_attention_layers": cross,
        },
        "vision_config": {
            **VISION_CONFIG,
            **shape,
            "intermediate_size": 4 * args.vision_dim,
            "vision_output_dim": (1 + len(args.vision_taps)) * args.vision_dim,
            "supported_aspect_ratios": [list(canvas) for canvas in canvases(args.vision_max_num_chunks)],
        },
    }


def canvases(max_tiles: int) -> list[tuple[int, int]]:
    """Rows and columns of each canvas, in the order of Hugging Face's tables."""
    sides = range(1, max_tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles]


def mllama_name(name: str, args: VisionArgs) -> str:
    """A native tensor's name in Hugging Face's files."""
    if name == LEARNABLE:
        return mllama_name(EMBEDDINGS, args)
    if name.startswith(ENCODER):
        part = name.removeprefix(ENCODER)
        for old, new in BLOCK.items() if part not in PARTS else ():
            part = part.replace(old, new)
        return f"vision_model.{PARTS.get(part, part)}"
    if name.startswith("vision_model.vision_projection."):
        return f"multi_modal_projector.{name.rpartition('.')[2]}"
    if match := re.fullmatch(r"(cross_attention_)?layers\.(\d+)\.(.+)", name):
        number = int(match[2])
        if match[1]:
            number += args.fusion[number]
            if match[3] in CROSS:
                return f"language_model.model.layers.{number}.{CROSS[match[3]]}"
            found = hf_name(f"layers.{number}.{match[3]}").replace("self_attn", "cross_attn")
            return f"language_model.{found}"
        number += sum(layer <= number for layer in args.fusion)
        name = f"layers.{number}.{match[3]}"
    return f"language_model.{hf_name(name)}"


def usual_name(name: str) -> str:
    """A tensor's name in most of Hugging Face's files, from the one that `transformers` has in memory."""
    old = next((old for old in RENAMED if name.startswith(old)), "")
    return RENAMED.get(old, "") + name.removeprefix(old)


def is_table(name: str) -> bool:
    return name.startswith(ENCODER) and name.removeprefix(ENCODER) in TABLES


def to_table(places: Tensor) -> Tensor:
    """Table by position (tiles, tiles, tokens, dim) to one by canvas (1 + canvases, tiles * tokens * dim)."""
    n = len(places)
    table = places.new_zeros(1 + len(canvases(n)), n, *places.shape[2:])
    for row, (h, w) in zip(table[1:], canvases(n), strict=True):
        row[: h * w] = places[:h, :w].flatten(0, 1)
    return table.flatten(1)


def from_table(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_table`; positions on no canvas are 0 and never read.

    Raises CheckpointError if the table's canvases contradict each other.
    """
    places = table.new_zeros(shape)
    rows = table.unflatten(1, (shape[0], *shape[2:]))
    for row, (h, w) in zip(rows[1:], canvases(shape[0]), strict=True):
        places[:h, :w] = row[: h * w].unflatten(0, (h, w))
    if not torch.equal(to_table(places)[1:], table[1:]):
        raise CheckpointError(
            "the tile position tables differ between canvases, which no Meta model's do: "
            "was this one fine-tuned with another program?"
        )
    return places


def file_shape(name: str, shape: tuple[int, ...], args: VisionArgs) -> tuple[int, ...]:
    """The shape in Hugging Face's files of a native tensor."""
    if name in (EMBEDDINGS, LEARNABLE):
        return args.vocab_size + 8, args.dim
    if is_table(name):
        return 1 + len(canvases(shape[0])), shape[0] * shape[2] * shape[3]
    if name == f"{ENCODER}conv1._linear.weight":
        return shape[0], 3, 14, 14
    return shape


class MllamaWeights(HFWeights):
    """`HFWeights` for a vision model."""

    args: VisionArgs

    def usual_name(self, name: str) -> str:
        return usual_name(name)

    def file_name(self, name: str) -> str:
        return mllama_name(name, self.args)

    def file_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return file_shape(name, shape, self.args)

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        shape = self.shapes[name]
        if name in (EMBEDDINGS, LEARNABLE):
            before = 0 if name == EMBEDDINGS else self.args.vocab_size
            start, stop = span if span and dim == 0 else (0, shape[0])
            rows: Tensor = self._stored(name)[before + start : before + stop]
            return rows if dim == 0 else rows[:, slice(*span) if span else slice(None)]
        if self.file_shape(name, shape) == shape:
            return super().read(name, dim, span)
        tensor = self._stored(name)[:]
        tensor = from_table(tensor, shape) if is_table(name) else tensor.flatten(1)
        start, stop = span or (0, shape[dim])
        return tensor.narrow(dim, start, stop - start)
