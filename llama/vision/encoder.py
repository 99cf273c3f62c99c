"""The image encoder of Llama 3.2 Vision: from the tiles of one image to one vector per patch.

Reads in the order of the forward pass: arguments, patches, attention, feed-forward, block, encoder,
projection. Linear layers are those of `parallel`, as in the text model.
(Grattafiori et al. 2024, section 7; Meta's code: llama-models, models/llama3/multimodal.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.errors import ArgumentError, check_number, shown
from llama.model import ModelArgs
from llama.parallel import ColumnParallelLinear, Joined, ModelParallel, RowParallelLinear
from llama.vision.images import TiledImage

PATCH = 14  # pixels per side
# Larger sizes are a mistake or an attack, not a model.
LARGEST = {
    **{"vision_chunk_size": 4096, "vision_max_num_chunks": 64, "vision_num_cross_attention_layers": 1024},
    **{"vision_dim": 2**16, "vision_heads": 1024, "vision_layers": 1024, "vision_global_layers": 1024},
    "max_images": 2**16,
}


@dataclass
class VisionArgs(ModelArgs):
    """`ModelArgs` of a vision model. Raises ArgumentError if the numbers contradict each other."""

    vision_chunk_size: int = 560  # pixels per side of a tile
    vision_max_num_chunks: int = 4  # maximum tiles per image
    vision_num_cross_attention_layers: int = 8

    # The encoder's shape is the same in every released model, so `params.json` omits it.
    vision_dim: int = 1280
    vision_heads: int = 16
    vision_layers: int = 32
    vision_global_layers: int = 8
    vision_taps: Sequence[int] = (3, 7, 15, 23, 30)  # layers whose inputs are also features

    max_images: int = 1  # per sequence, in the cache

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in LARGEST.items():
            if name != "max_images" or self.max_images != 0:
                check_number(name, getattr(self, name), most)
        taps = [layer for layer in self.vision_taps if isinstance(layer, int)]
        if [*self.vision_taps] != sorted({*taps} & {*range(self.vision_layers)}):
            raise ArgumentError(
                f"vision_taps must be layers from 0 to {self.vision_layers - 1} in ascending order, "
                f"not {shown(self.vision_taps)}"
            )
        if self.vision_chunk_size % PATCH:
            raise ArgumentError(
                f"vision_chunk_size={self.vision_chunk_size} is not a multiple of {PATCH} pixels"
            )
        if self.vision_dim % self.vision_heads:
            raise ArgumentError(f"vision_dim={self.vision_dim} does not split into {self.vision_heads} heads")
        if self.vision_num_cross_attention_layers > self.n_layers:
            raise ArgumentError(
                f"vision_num_cross_attention_layers={self.vision_num_cross_attention_layers} must be at most "
                f"the number of layers, {self.n_layers}"
            )
        if self.fusion[0] < 0:
            raise ArgumentError(
                f"vision_num_cross_attention_layers={self.vision_num_cross_attention_layers} cannot be "
                f"spaced evenly among {self.n_layers} layers, one before the last of them"
            )

    @property
    def tile_tokens(self) -> int:
        """Vectors that the encoder computes per tile: one per patch, and one for the whole tile."""
        return (self.vision_chunk_size // PATCH) ** 2 + 1

    @property
    def image_tokens(self) -> int:
        """Maximum number of vectors per image."""
        return self.vision_max_num_chunks * self.tile_tokens

    @property
    def activations(self) -> int:
        """Numbers that are alive at once, at most, while an image of all tiles is encoded.

        That is at the end, when the features of all layers are collected.
        """
        features = self.vision_dim * (1 + len(self.vision_taps))
        return self.vision_max_num_chunks * (self.tile_tokens + 8) * (3 * features + self.vision_dim)

    @property
    def fusion(self) -> list[int]:
        """The layers with a cross-attention block before them: evenly spaced, including the last."""
        count = self.vision_num_cross_attention_layers
        return [self.n_layers - 1 - math.ceil(self.n_layers / count) * i for i in reversed(range(count))]


@runtime_checkable
class FusedProduct(Protocol):
    """A `Product` that can also add a bias (out) and apply GELU, without another pass over the result."""

    def fused(self, x: Tensor, bias: Tensor, gelu: bool) -> Tensor: ...


class BiasedColumns(ColumnParallelLinear):
    """A `ColumnParallelLinear` that adds this rank's part of a bias (out)."""

    def __init__(self, in_features: int, out_features: int, parallel: ModelParallel) -> None:
        super().__init__(in_features, out_features, parallel)
        self.bias = nn.Parameter(torch.empty(len(self.weight)), requires_grad=False)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        if isinstance(self.backend, FusedProduct):
            return self.backend.fused(x, self.bias, gelu)
        x = super().forward(x).add_(self.bias)
        return F.gelu(x) if gelu else x


class BiasedRows(RowParallelLinear):
    """A `RowParallelLinear` that adds a bias (out), once, to the sum over the ranks."""

    def __init__(self, in_features: int, out_features: int, parallel: ModelParallel) -> None:
        super().__init__(in_features, out_features, parallel)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel.size == 1 and isinstance(self.backend, FusedProduct):
            return self.backend.fused(x, self.bias, False)
        return super().forward(x).add_(self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al. 2016) whose parameters need no gradient."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.requires_grad_(False)


class PatchEmbedding(nn.Module):
    """Every patch of a tile times one matrix: a convolution without overlap."""

    def __init__(self, dim: int, parallel: ModelParallel) -> None:
        super().__init__()
        self.dim, self.parallel = dim, parallel
        self._linear = ColumnParallelLinear(3 * PATCH * PATCH, dim, parallel)

    def forward(self, pixels: Tensor) -> Tensor:
        """(tiles, 3, size, size) to (tiles, patches, dim)."""
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
        return self.parallel.all_gather(self._linear(patches), self.dim)


class TileEmbedding(nn.Module):
    """A vector for each position of a tile on a canvas, times tanh of a gate."""

    def __init__(self, max_tiles: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(max_tiles, max_tiles, 1, dim), requires_grad=False)
        self.gate = nn.Parameter(torch.empty(1), requires_grad=False)

    def forward(self, rows: int, columns: int) -> Tensor:
        """(rows * columns, 1, dim)."""
        return self.gate.tanh() * self.embedding[:rows, :columns].flatten(0, 1)


class Padding(NamedTuple):
    """The layout of an image's tokens: first those of its tiles, then padding, which sees no padding.

    bias: (tokens), added to the attention scores of each token as a key
    """

    valid: int
    bias: Tensor | None


def attend(qkv: Tensor, padding: Padding) -> Tensor:
    """Attention among an image's tokens: (tokens, 3, heads, head_dim) to (tokens, heads * head_dim)."""
    q, k, v = qkv.permute(1, 2, 0, 3).contiguous()[:, None]  # each (1, heads, tokens, head_dim)
    valid, bias = padding
    bias = None if bias is None else bias.expand(valid, -1)
    seen = F.scaled_dot_product_attention(q[:, :, :valid], k, v, attn_mask=bias)
    blind = F.scaled_dot_product_attention(q[:, :, valid:], k[:, :, :valid], v[:, :, :valid])
    return torch.cat((seen, blind), 2)[0].transpose(0, 1).flatten(1)


class ImageAttention(nn.Module):
    """Self-attention among the tokens of one image, for this rank's heads."""

    kernel: Callable[[Tensor, Padding], Tensor] | None = None  # replaces `attend`

    def __init__(self, args: VisionArgs, parallel: ModelParallel) -> None:
        super().__init__()
        dim, self.head_dim = args.vision_dim, args.vision_dim // args.vision_heads
        start, stop = parallel.span(args.vision_heads)
        self.heads = stop - start
        spans = [(start * self.head_dim, stop * self.head_dim)]
        self.wq, self.wk, self.wv = (ColumnParallelLinear(dim, dim, parallel, spans) for _ in range(3))
        self.wo = RowParallelLinear(dim, dim, parallel, unit=self.head_dim)
        self.wqkv = Joined(self.wq, self.wk, self.wv)

    def forward(self, x: Tensor, padding: Padding) -> Tensor:
        """x (tokens, dim) to (tokens, dim)."""
        qkv = self.wqkv(x).view(len(x), 3, self.heads, self.head_dim)
        return self.wo((self.kernel or attend)(qkv, padding))


class ImageFeedForward(nn.Module):
    """Two matrices with biases and GELU between them."""

    def __init__(self, args: VisionArgs, parallel: ModelParallel) -> None:
        super().__init__()
        self.c_fc = BiasedColumns(args.vision_dim, 4 * args.vision_dim, parallel)
        self.c_proj = BiasedRows(4 * args.vision_dim, args.vision_dim, parallel)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x, gelu=True))


class ImageBlock(nn.Module):
    """A block of a vision transformer (Dosovitskiy et al. 2021). gated: by tanh, as in the global blocks."""

    def __init__(self, args: VisionArgs, parallel: ModelParallel, gated: bool) -> None:
        super().__init__()
        self.attn = ImageAttention(args, parallel)
        self.ln_1 = LayerNorm(args.vision_dim)
        self.mlp = ImageFeedForward(args, parallel)
        self.ln_2 = LayerNorm(args.vision_dim)
        self.gated = gated
        if gated:
            self.gate_attn = nn.Parameter(torch.empty(1), requires_grad=False)
            self.gate_ffn = nn.Parameter(torch.empty(1), requires_grad=False)

    def forward(self, x: Tensor, padding: Padding) -> Tensor:
        # The input may be a tap, so only what the branches return is overwritten.
        attention = self.attn(self.ln_1(x), padding)
        x = (attention.mul_(self.gate_attn.tanh()) if self.gated else attention).add_(x)
        feed_forward = self.mlp(self.ln_2(x))
        return (feed_forward.mul_(self.gate_ffn.tanh()) if self.gated else feed_forward).add_(x)


class ImageTransformer(nn.Module):
    """A sequence of blocks."""

    def __init__(self, args: VisionArgs, parallel: ModelParallel, layers: int, gated: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ImageBlock(args, parallel, gated) for _ in range(layers))


class VisionEncoder(nn.Module):
    """A vision transformer over all tiles of an image: local blocks, then gated global ones."""

    def __init__(self, args: VisionArgs, parallel: ModelParallel) -> None:
        super().__init__()
        self.args = args
        dim, tiles, tokens = args.vision_dim, args.vision_max_num_chunks, args.tile_tokens
        self.conv1 = PatchEmbedding(dim, parallel)
        self.class_embedding = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.positional_embedding = nn.Parameter(torch.empty(tokens, dim), requires_grad=False)
        self.gated_positional_embedding = nn.Parameter(
            torch.empty(tiles, tiles, tokens, dim), requires_grad=False
        )
        self.gated_positional_embedding_gate = nn.Parameter(torch.empty(1), requires_grad=False)
        self.pre_tile_pos_embed = TileEmbedding(tiles, dim)
        self.post_tile_pos_embed = TileEmbedding(tiles, dim)
        self.ln_pre, self.ln_post = LayerNorm(dim), LayerNorm(dim)
        self.transformer = ImageTransformer(args, parallel, args.vision_layers, gated=False)
        self.global_transformer = ImageTransformer(args, parallel, args.vision_global_layers, gated=True)

    def forward(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """Features (tiles * tile_tokens, (1 + taps) * dim) of normalized pixels (tiles, 3, size, size).

        First the last layer's output, then for each channel the inputs of the layers `vision_taps`.

        The model was trained on the maximum number of tiles, whatever the canvas, and on tokens padded to
        the next multiple of 8 (8 more if they are one already). Valid tokens see padding, so it has to be
        computed too. But missing tiles are all alike, so one represents all of them; a bias of log(count)
        on its keys makes it count that many times.
        """
        dim, tokens, tiles = self.args.vision_dim, self.args.tile_tokens, rows * columns
        missing = self.args.vision_max_num_chunks - tiles
        extra = 8 - tokens % 8

        x = self.conv1(pixels) + self.pre_tile_pos_embed(rows, columns)
        x = F.pad(x, (0, 0, 1, 0, 0, min(missing, 1)))  # room for the class token, and one missing tile
        x[:, 0] += self.class_embedding
        gate = self.gated_positional_embedding_gate.tanh()
        x += (1 - gate) * self.positional_embedding
        x[:tiles] += gate * self.gated_positional_embedding[:rows, :columns].flatten(0, 1)
        x = F.pad(self.ln_pre(x), (0, 0, 0, extra))

        sizes = tiles * tokens, tiles * extra, len(x) * (tokens + extra) - tiles * (tokens + extra)
        x = torch.cat([part.flatten(0, 1) for part in (x[:tiles, :tokens], x[:tiles, tokens:], x[tiles:])])
        bias = None
        if missing > 1:
            bias = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            bias[-sizes[-1] :] = math.log(missing)
        padding = Padding(tiles * tokens, bias)

        taps = []
        for i, block in enumerate(self.transformer.resblocks):
            if i in self.args.vision_taps:
                taps.append(x[: padding.valid])
            x = block(x, padding)
        x = self.ln_post(x)
        for part in x.split(sizes)[:2]:
            part.view(tiles, -1, dim).add_(self.post_tile_pos_embed(rows, columns))
        for block in self.global_transformer.resblocks:
            x = block(x, padding)
        return torch.cat((x[: padding.valid], torch.stack(taps, -1).flatten(1)), 1)


class VisionModel(nn.Module):
    """The encoder, and the projection of its features to the text model's width."""

    def __init__(self, args: VisionArgs, parallel: ModelParallel) -> None:
        super().__init__()
        self.params, self.parallel = args, parallel
        self.vision_encoder = VisionEncoder(args, parallel)
        self.vision_projection = BiasedColumns(
            (1 + len(args.vision_taps)) * args.vision_dim, args.dim, parallel
        )

    def forward(self, image: TiledImage) -> Tensor:
        """An image to (tiles * tile_tokens, dim)."""
        bias = self.vision_projection.bias
        pixels = image.normalized().to(bias.device, bias.dtype)
        features = self.vision_encoder(pixels, image.rows, image.columns)
        return self.parallel.all_gather(self.vision_projection(features), self.params.dim)
