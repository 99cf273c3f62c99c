"""Llama 3.2 Vision: pictures to tiles (`images`), tiles to vectors (`encoder`), and the model that reads
both text and images (`transformer`)."""

from llama.vision.encoder import VisionArgs
from llama.vision.images import TiledImage, tile_image
from llama.vision.transformer import PlacedImage, VisionTransformer

__all__ = ["PlacedImage", "TiledImage", "VisionArgs", "VisionTransformer", "tile_image"]
