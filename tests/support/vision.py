"""Tiny vision models with random weights, their checkpoints, and pictures to show them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llama.checkpoint.mllama import canvases
from llama.vision import TiledImage, VisionArgs, VisionTransformer
from tests.support import tiny

if TYPE_CHECKING:
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

PARAMS = {
    "dim": 128,
    "n_layers": 8,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": tiny.VOCAB,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 56,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 2,
}
# For the encoder, whose real shape is fixed in Meta's code.
ENCODER = {"vision_dim": 64, "vision_heads": 4}
IMAGE = PARAMS["vocab_size"]  # the image token


def draw(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """A random weight, scaled so that every part of the model matters."""
    x = torch.randn(like.shape, generator=generator)
    if "norm" in name or "ln_" in name:
        return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
    if "gate" in name and like.numel() == 1:
        return 0.5 + 0.3 * x
    if name.endswith("bias"):
        return 0.1 * x
    return 0.5 * x if "embed" in name else x / math.sqrt(like.shape[-1])


def random_vision(seed: int = 0, **changes: object) -> VisionTransformer:
    """A model of this package with random weights."""
    args = {**PARAMS, **ENCODER, "max_seq_len": 64, "max_batch_size": 4, "max_images": 4, **changes}
    with torch.device("meta"):
        vision = VisionTransformer(VisionArgs(**args))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: draw(name, w, generator) for name, w in vision.state_dict().items()}
    vision.load_state_dict(weights, strict=True, assign=True)
    return vision


def reference(folder: Path) -> MllamaForConditionalGeneration:
    """transformers' model. Its encoder hands out the features of five layers as they are one layer later
    than in Meta's code, so those before are asked for.
    """
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

    hf = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    hf.model.vision_model.intermediate_layers_indices = [2, 6, 14, 22, 29]
    return hf


def reference_logits(hf: torch.nn.Module, tokens: list[int], images: list[TiledImage]) -> Tensor:
    """Logits (1, length, vocab_size) of transformers' model for one prompt.

    Tokens that see no image get the mean of all values from its cross-attention, and should get nothing.
    """
    side = images[0].pixels.shape[-1]
    pixels = torch.zeros(1, len(images), 4, 3, side, side)
    valid = torch.zeros(1, len(images), 4, dtype=torch.long)
    mask = torch.zeros(1, len(tokens), len(images), 4, dtype=torch.long)
    for i, (image, (start, stop)) in enumerate(zip(images, spans(tokens), strict=True)):
        n = len(image.pixels)
        pixels[0, i, :n], valid[0, i, :n] = image.normalized(), 1
        mask[0, start : len(tokens) if stop < 0 else stop, i, :n] = 1
    sees = mask.flatten(2).any(-1)[..., None]
    blocks = [module for name, module in hf.named_modules() if name.endswith(".cross_attn")]
    hooks = [
        block.register_forward_hook(lambda *args: (args[-1][0] * sees, *args[-1][1:])) for block in blocks
    ]
    try:
        return hf(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            pixel_values=pixels,
            aspect_ratio_ids=torch.tensor([[1 + canvases(4).index((im.rows, im.columns)) for im in images]]),
            aspect_ratio_mask=valid,
            cross_attention_mask=mask,
        ).logits
    finally:
        for hook in hooks:
            hook.remove()


def cut_along(name: str) -> int | None:
    """The dimension that Meta's files split a tensor along."""
    kind, _, last = name.rpartition(".")
    kind = kind.rpartition(".")[2]
    if kind in ("wo", "w2", "c_proj"):
        return 1 if last == "weight" else None
    columns = ("_linear", "c_fc", "vision_projection", "learnable_embedding", "tok_embeddings", "output")
    return 0 if kind in columns or kind in ("wq", "wk", "wv", "w1", "w3") else None


def write_checkpoint(folder: Path, vision: VisionTransformer, count: int = 1) -> Path:
    """A model as Meta's files, with a tokenizer."""
    folder.mkdir(parents=True)
    for i in range(count):
        file = {}
        for name, weight in vision.state_dict().items():
            prefix = "" if name.startswith("vision_model.") else "text_model."
            dim = cut_along(name)
            file[prefix + name] = (weight if dim is None else weight.chunk(count, dim)[i]).clone()
        torch.save(file, folder / f"consolidated.{i:02d}.pth")
    args = vision.params
    (folder / "params.json").write_text(json.dumps({name: getattr(args, name) for name in PARAMS | ENCODER}))
    tiny.write_tokenizer(folder / "tokenizer.model")
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a ramp, which reveals every resampling mistake."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 128, width)[None, :, None] + np.linspace(0, 64, height)[:, None, None]
    return Image.fromarray((ramp + random.integers(0, 64, (height, width, 3))).astype(np.uint8))


def spans(tokens: list[int]) -> list[list[int]]:
    """The range of positions that see each image of a prompt, computed as in Meta's code."""
    at = [i for i, token in enumerate(tokens) if token == IMAGE]
    if len(at) == 1:
        return [[at[0], -1]]
    ends = [[a, b] for a, b in zip(at, [*at[1:], len(tokens)], strict=False)]
    for before, after in zip(ends[-2::-1], ends[:0:-1], strict=True):
        if before[0] + 1 == before[1]:
            before[1] = after[1]
    return ends
