"""Llama 3.2 Vision: the text model with cross-attention blocks between its layers, and their cache.

In a step without images it is the text model, at the same cost.

An image takes one position in the sequence, with a token of its own. Tokens from there to the next image,
or to the end, see it; images that directly follow one another are seen together. In Meta's code, tokens
generated after two or more images see none; here they see what the prompt's last token sees.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.errors import PromptError
from llama.model import (
    Attention,
    FeedForward,
    KVCache,
    RaggedStep,
    RMSNorm,
    Row,
    Step,
    StepBackend,
    Transformer,
    local_kv_heads,
)
from llama.parallel import Joined, ModelParallel, VocabParallelEmbedding
from llama.vision.encoder import VisionArgs, VisionModel
from llama.vision.images import TiledImage


class Sight(NamedTuple):
    """Some tokens of a step, and the part of a slot's image cache that they see."""

    tokens: slice
    slot: int
    seen: slice


class CrossAttention(Attention):
    """Attention from text (queries) to images (keys and values), without positions."""

    def __init__(self, args: VisionArgs, parallel: ModelParallel) -> None:
        super().__init__(args, parallel)
        del self.wqkv
        self.wkv = Joined(self.wk, self.wv)
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps)
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps)

    def keys_values(self, image: Tensor) -> Tensor:
        """An image's keys and values (2, n_kv_heads, tokens, head_dim), from its vectors (tokens, dim)."""
        keys, values = self.wkv(image).view(len(image), 2, -1, self.head_dim).transpose(0, 1)
        return torch.stack((self.k_norm(keys), values)).transpose(1, 2)

    def forward(self, x: Tensor, cache: Tensor, sights: Sequence[Sight]) -> Tensor:  # type: ignore[override]
        """x (N, dim) to (N, dim), 0 for tokens without images. cache: one of `VisionTransformer.images`."""
        queries = self.q_norm(self.wq(x).view(len(x), -1, self.head_dim))
        out = torch.zeros_like(queries)
        for tokens, slot, seen in sights:
            keys, values = cache[:, slot, :, seen]
            # All see the same keys, so query heads that share a key head become rows of one query.
            q = queries[tokens].unflatten(1, (len(keys), -1)).transpose(0, 1)
            attended = F.scaled_dot_product_attention(q.flatten(1, 2)[None], keys[None], values[None])
            out[tokens] = attended.view_as(q).transpose(0, 1).flatten(1, 2)
        return self.wo(out.flatten(1))


class CrossAttentionBlock(nn.Module):
    """A `TransformerBlock` that reads images, with both branches gated by tanh."""

    def __init__(self, args: VisionArgs, parallel: ModelParallel) -> None:
        super().__init__()
        self.attention = CrossAttention(args, parallel)
        self.feed_forward = FeedForward(args, parallel)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.gate_attn = nn.Parameter(torch.empty(1), requires_grad=False)
        self.gate_ffwd = nn.Parameter(torch.empty(1), requires_grad=False)

    def forward(self, x: Tensor, cache: Tensor, sights: Sequence[Sight], blind: Tensor) -> Tensor:
        """x (N, dim) to (N, dim). blind: bool (N, 1), tokens that see no image and stay unchanged."""
        x += self.gate_attn.tanh() * self.attention(self.attention_norm(x), cache, sights)
        x += self.gate_ffwd.tanh() * self.feed_forward(self.ffn_norm(x)).masked_fill_(blind, 0)
        return x


class PlacedImage(NamedTuple):
    """An image at its position in a sequence."""

    position: int
    image: TiledImage


class HeldImage(NamedTuple):
    """An image in a slot's part of the cache, at start … stop - 1."""

    key: str
    position: int
    start: int
    stop: int


def sights(images: Sequence[HeldImage], row: Row, first: int) -> Iterator[Sight]:
    """What the tokens of a row see. first: index of the row's first token in the step."""
    begin = 0
    for i, image in enumerate(images):
        if i == 0 or images[i - 1].position + 1 < image.position:
            begin = image.start  # earlier images are no longer seen
        start = max(row.start, image.position)
        stop = min(row.stop, images[i + 1].position) if i + 1 < len(images) else row.stop
        if start < stop:
            tokens = slice(first + start - row.start, first + stop - row.start)
            yield Sight(tokens, row.slot, slice(begin, image.stop))


class VisionStepBackend(StepBackend, Protocol):
    """A `StepBackend` that also attends to images.

    sights: what some of the tokens see. images: the model's cache.
    """

    def hidden(
        self,
        tokens: Tensor,
        rows: Sequence[Row],
        cache: Tensor,
        rotations: Tensor,
        sights: Sequence[Sight] = (),
        images: Tensor | None = None,
    ) -> Tensor: ...


class VisionTransformer(Transformer):
    """A Llama 3.2 Vision model, or one rank's part of it. The image token's id is `vocab_size`.

    load_tower: loads `vision_model`, which may stay on the meta device until the first image
    """

    params: VisionArgs
    step_backend: VisionStepBackend | None = None
    _images: Tensor | None = None
    load_tower: Callable[[], None] | None = None

    def __init__(self, params: VisionArgs, parallel: ModelParallel | None = None) -> None:
        super().__init__(params, parallel)
        self.vision_model = VisionModel(params, self.parallel)
        self.cross_attention_layers = nn.ModuleList(
            CrossAttentionBlock(params, self.parallel) for _ in params.fusion
        )
        # For the image token and 7 unused ones. Files split it, but every rank has all of it.
        self.learnable_embedding = VocabParallelEmbedding(8, params.dim, ModelParallel())
        self.held: list[list[HeldImage]]
        self.forget_images()

    def image_cache_shape(self) -> tuple[int, ...]:
        """(cross-attention layers, 2, max_batch_size, n_kv_heads, max_images * image_tokens, head_dim)."""
        args = self.params
        heads, tokens = len(local_kv_heads(args, self.parallel)), args.max_images * args.image_tokens
        return len(args.fusion), 2, args.max_batch_size, heads, tokens, args.head_dim

    @torch.inference_mode(False)
    def allocate_cache(self) -> KVCache:
        self._images = torch.zeros(self.image_cache_shape(), dtype=self.dtype, device=self.device)
        self.forget_images()
        return super().allocate_cache()

    @property
    def images(self) -> Tensor:
        """Keys and values of the slots' images, of valid tiles only; see `image_cache_shape`."""
        assert self._images is not None
        return self._images

    def forget_images(self) -> None:
        """Remove all images from the slots, because weights or the cache have changed."""
        self.held = [[] for _ in range(self.params.max_batch_size)]

    def check_images(self, prompt: Sequence[int], images: Sequence[TiledImage]) -> None:
        """Raise PromptError unless each image has its token in the prompt, and all fit in the cache."""
        tokens = sum(token == self.params.vocab_size for token in prompt)
        if tokens != len(images):
            raise PromptError(
                f"the prompt has {tokens} image token(s) (id {self.params.vocab_size}), but {len(images)} "
                "image(s) were passed: each needs one token"
            )
        self.check_room(images)

    def check_room(self, images: Sequence[TiledImage]) -> None:
        """Raise PromptError for images that do not fit in a slot's part of the cache."""
        if len(images) > self.params.max_images:
            raise PromptError(
                f"the prompt has {len(images)} images, but max_images={self.params.max_images}; "
                "build with a larger max_images"
            )
        side, most = self.params.vision_chunk_size, self.params.vision_max_num_chunks
        for image in images:
            tiles = image.rows * image.columns
            if image.pixels.shape != (tiles, 3, side, side) or not 0 < tiles <= most:
                raise PromptError(
                    f"an image has {tiles} tiles and pixels of {tuple(image.pixels.shape)}, but this model "
                    f"reads 1 to {most} tiles of (3, {side}, {side}): "
                    f"make it with tile_image(…, {side}, {most})"
                )

    @torch.inference_mode()
    def place(self, slot: int, images: Sequence[PlacedImage]) -> None:
        """Assign these images, in the order of their positions, to the sequence in a cache slot.

        Images that any slot already has are not computed again. Raises what `check_room` raises.
        """
        self.check_room([image for _, image in images])
        _ = self.cache  # allocates both caches
        before = self.held[slot]
        pairs = zip(before, images, strict=False)
        same = next((i for i, (held, new) in enumerate(pairs) if held.key != new.image.key), None)
        kept = before[: len(images)] if same is None else before[:same]
        self.held[slot] = [
            held._replace(position=position) for held, (position, _) in zip(kept, images, strict=False)
        ]
        for position, image in images[len(kept) :]:
            start = self.held[slot][-1].stop if self.held[slot] else 0
            stop = start + image.rows * image.columns * self.params.tile_tokens
            # Also those that the slot had and that are not overwritten yet.
            places = [(slot, held) for held in before if held.start >= start]
            places += [(other, held) for other, all_held in enumerate(self.held) for held in all_held]
            found = next(((other, held) for other, held in places if held.key == image.key), None)
            target = self.images[:, :, slot, :, start:stop]
            if found:
                other, held = found
                source = self.images[:, :, other, :, held.start : held.stop]
                target.copy_(source.clone() if other == slot else source)  # they may overlap
            else:
                tokens = self.encode(image)
                for block, cache in zip(self.cross_attention_layers, target, strict=True):
                    assert isinstance(block, CrossAttentionBlock)
                    cache.copy_(block.attention.keys_values(tokens))
            self.held[slot].append(HeldImage(image.key, position, start, stop))

    def encode(self, image: TiledImage) -> Tensor:
        """The vectors (tiles * tile_tokens, dim) that represent an image."""
        if self.load_tower:
            self.load_tower()
            self.load_tower = None
        return self.vision_model(image)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        start_pos: int | Tensor,
        images: Sequence[Sequence[PlacedImage]] | None = None,
    ) -> Tensor:
        """Like `Transformer.forward`.

        images: for each row; by default none if start_pos is 0, else those that it already has
        """
        if images is not None or (isinstance(start_pos, int) and start_pos == 0):
            for slot in range(len(tokens)):
                self.place(slot, images[slot] if images else ())
        return super().forward(tokens, start_pos)

    def sights(self, rows: Sequence[Row]) -> list[Sight]:
        """What the tokens of a step's rows see."""
        seen, first = list[Sight](), 0
        for row in rows:
            seen += sights(self.held[row.slot], row, first)
            first += row.length
        return seen

    def whole_step(self, tokens: Tensor, rows: Sequence[Row]) -> Tensor:
        assert self.step_backend
        seen = self.sights(rows)
        return self.step_backend.hidden(tokens, rows, self.cache.data, self.rotations, seen, self.images)

    def run(self, tokens: Tensor, step: Step) -> Tensor:
        """Like `Transformer.run`; a step at fixed shapes sees no images."""
        seen = self.sights(step.rows) if isinstance(step, RaggedStep) else []
        if not seen:
            return super().run(tokens, step)
        blind = torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        for sight in seen:
            blind[sight.tokens] = False
        blocks = zip(self.cross_attention_layers, self.images, strict=True)
        cross = dict(zip(self.params.fusion, blocks, strict=True))
        x = self.embed(tokens)
        for i, (layer, cache) in enumerate(zip(self.layers, self.cache.data, strict=True)):
            if i in cross:
                block, images = cross[i]
                x = block(x, images, seen, blind)
            x = layer(x, cache, step)
        return self.norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (N) to vectors (N, dim)."""
        images = tokens >= self.params.vocab_size
        x = self.tok_embeddings(tokens.masked_fill(images, 0))
        added = self.learnable_embedding((tokens - self.params.vocab_size).clamp_(min=0))
        return torch.where(images[:, None], added, x)


def reads_images(name: str) -> bool:
    """Whether a matrix of a `VisionTransformer` is applied to whole images, not to a step's tokens."""
    cross = name.startswith("cross_attention_layers.") and name.endswith((".wk.weight", ".wv.weight"))
    return cross or name.startswith("vision_model.")


def sighted(model: Transformer) -> VisionTransformer:
    """The model itself. Raises PromptError if it reads text only."""
    if not isinstance(model, VisionTransformer):
        raise PromptError(
            "this model reads text only: leave the images out, or build a vision model (with vision=True)"
        )
    return model
