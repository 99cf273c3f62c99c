"""Llama 3.2 Vision: images to tiles (`images`), tiles to vectors (`encoder`), and the model that reads both
text and images (`transformer`)."""

from collections.abc import Mapping
from typing import Any

from llama.model import ModelArgs, Transformer
from llama.parallel import ModelParallel
from llama.vision.encoder import ImageAttention, Padding, VisionArgs, VisionModel, attend
from llama.vision.images import ImageSource, TiledImage, image_bytes, open_image, tile_image
from llama.vision.transformer import PlacedImage, Sight, VisionTransformer, reads_images, sighted

__all__ = [
    "ImageAttention",
    "ImageSource",
    "Padding",
    "PlacedImage",
    "Sight",
    "TiledImage",
    "VisionArgs",
    "VisionModel",
    "VisionTransformer",
    "attend",
    "image_bytes",
    "make_args",
    "make_model",
    "open_image",
    "reads_images",
    "sighted",
    "text_params",
    "tile_image",
]


def make_args(
    params: Mapping[str, Any], max_seq_len: int = 2048, max_batch_size: int = 32, max_images: int = 1
) -> ModelArgs:
    """The arguments in a checkpoint's `params.json`; those of a vision model if it has vision keys.

    max_images: for vision models only
    """
    cache = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    if "vision_chunk_size" in params:
        return VisionArgs(**{**params, **cache, "max_images": max_images})
    return ModelArgs(**{**params, **cache})


def text_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `params.json` that describes the text model."""
    return {name: value for name, value in params.items() if not name.startswith("vision_")}


def make_model(args: ModelArgs, parallel: ModelParallel | None = None) -> Transformer:
    """The model with these arguments, or one rank's part of it."""
    return VisionTransformer(args, parallel) if isinstance(args, VisionArgs) else Transformer(args, parallel)
