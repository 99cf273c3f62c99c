"""The Llama transformer, from token ids to logits, over a preallocated KV cache.

Reads top to bottom in the order of the forward pass: norm, rotary embedding, attention, feed-forward,
block, transformer. Knows nothing about files, the meaning of tokens, or sampling.

A step is ragged: the new tokens of several sequences are concatenated in one tensor of N tokens, and a
`Row` gives each sequence's cache slot and positions. Linear layers see N rows; attention runs one
sequence at a time over the live part of its slot. Prefill, chunked prefill and decode are the same
call with different lengths, and can share a step.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.errors import ArgumentError
from llama.model_args import ModelArgs as ModelArgs
from llama.parallel import (
    ColumnParallelLinear,
    Joined,
    ModelParallel,
    RowParallelLinear,
    VocabParallelEmbedding,
    merged,
)
from llama.ranks import current
from llama.sampling_params import Draw


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019): computed in fp32, cast back, then scaled."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Angle per position for each pair of a head's channels, in radians, fp32 (head_dim / 2).

    Su et al. 2021, section 3.2.2. With `use_scaled_rope`, low frequencies are scaled as in Llama 3.1
    (`rope_scaling` in its model card): wavelengths above 8192 positions by the full factor, those
    below 8192 / 4 not at all, and those in between by a blend of the two.
    """
    channels = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / args.rope_theta ** (channels / args.head_dim)
    if not args.use_scaled_rope or args.rope_scaling_factor is None:
        return frequencies
    low, high = args.low_freq_factor, args.high_freq_factor
    # Full turns within the original context.
    rotations = args.original_max_position_embeddings * frequencies / (2 * torch.pi)
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / args.rope_scaling_factor


def apply_rotary(x: Tensor, heads: int, rotation: Tensor) -> Tensor:
    """Rotate adjacent channels of the first `heads` of x (N, n, head_dim); in place unless compiling.

    rotation: fp32 (N, 1, head_dim / 2, 2), the cosine and the sine of each pair's angle.
    """
    pairs = x[:, :heads].unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # no complex numbers there, but these operations get fused
        a, b = pairs.float().unbind(-1)
        cos, sin = rotation.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        return torch.cat((turned.to(x.dtype), x[:, heads:]), 1)
    pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * torch.view_as_complex(rotation)))
    return x


class Row(NamedTuple):
    """`length` new tokens of one sequence, at positions start … start + length - 1 of cache `slot`."""

    slot: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class KVCache:
    """Keys and values of every slot, with an epoch that changes on every write.

    Code that relies on its own writes compares the epoch with that of its last write.
    data: (n_layers, 2, max_batch_size, n_kv_heads, max_seq_len, head_dim); keys may be in tiles of 16.
    """

    _epochs = itertools.count()  # shared, so that a new cache never repeats the epoch of an older one

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.mark_written()

    def mark_written(self) -> None:
        self.epoch = next(self._epochs)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` positions of slot `source` to slot `target`."""
        self.mark_written()
        slots = self.data[..., : (length + 15) // 16 * 16, :]  # in whole tiles, if a step backend has them
        slots[:, :, target] = slots[:, :, source]

    @torch.inference_mode()
    def clear(self, slot: int, start: int, stop: int) -> None:
        """Set positions start … stop - 1 of a slot to zero."""
        self.mark_written()
        self.data[:, :, slot, :, start:stop] = 0


class Step(Protocol):
    """What every layer needs to know about a step, computed once."""

    rotation: Tensor  # (N, 1, head_dim / 2, 2), fp32

    def attend(self, queries: Tensor, kv: Tensor, cache: Tensor) -> Tensor:
        """Write the new keys and values to the cache and attend to it.

        queries (N, n_heads, head_dim); kv (N, 2, n_kv_heads, head_dim); cache (2, max_batch_size,
        n_kv_heads, max_seq_len, head_dim). Returns the shape of queries.
        """


def causal_mask(row: Row, device: torch.device) -> Tensor | None:
    """Which keys each new token sees: all cached ones, then a triangle. None if no mask is needed."""
    if row.length == 1 or row.start == 0:
        return None
    return torch.ones(row.length, row.stop, dtype=torch.bool, device=device).tril(row.start)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023) for one sequence.

    q (length, n_heads, head_dim); keys, values (n_kv_heads, stop, head_dim). Returns the shape of q.
    """
    if len(q) == 1:
        # One query sees every key, and the query heads that share a key head become rows of one product.
        folded = q.view(1, len(keys), -1, q.shape[-1])  # (1, n_kv_heads, n_rep, head_dim)
        return F.scaled_dot_product_attention(folded, keys[None], values[None]).view_as(q)
    if mask is not None and q.is_cuda:
        # CUDA has no fused kernel for a mask with fewer key heads; without a mask it uses FlashAttention.
        keys, values = (x.repeat_interleave(q.shape[1] // len(x), 0) for x in (keys, values))
    grouped = len(keys) < q.shape[1]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None], mask, is_causal=mask is None, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)


class RaggedStep:
    """Rows of any length, in any slots, concatenated."""

    def __init__(self, rows: Sequence[Row], rotation: Tensor) -> None:
        self.rows, self.rotation = rows, rotation
        self.masks = [causal_mask(row, rotation.device) for row in rows]

    def attend(self, queries: Tensor, kv: Tensor, cache: Tensor) -> Tensor:
        kv = kv.permute(1, 2, 0, 3)  # (2, n_kv_heads, N, head_dim)
        outputs, first = [], 0  # (length, n_heads, head_dim) of each row
        for row, mask in zip(self.rows, self.masks, strict=True):
            new = slice(first, first := first + row.length)
            cached = cache[:, row.slot, :, : row.stop]  # only the live part
            cached[:, :, row.start :] = kv[:, :, new]
            outputs.append(attend(queries[new], cached[0], cached[1], mask))
        outputs.append(queries[first:])  # padding attends to nothing
        return torch.cat(outputs)


class Attention(nn.Module):
    """Self-attention for this rank's heads, over this rank's part of the cache."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel) -> None:
        super().__init__()
        self.head_dim = size = args.head_dim
        start, stop = parallel.span(args.n_heads)
        kv_heads = local_kv_heads(args, parallel)
        self.n_heads, self.n_kv_heads = stop - start, len(kv_heads)
        kv_spans = merged([(head * size, (head + 1) * size) for head in kv_heads])
        kv_dim = args.n_kv_heads * size

        self.wq = ColumnParallelLinear(args.dim, args.n_heads * size, parallel, [(start * size, stop * size)])
        self.wk = ColumnParallelLinear(args.dim, kv_dim, parallel, kv_spans)
        self.wv = ColumnParallelLinear(args.dim, kv_dim, parallel, kv_spans)
        self.wo = RowParallelLinear(args.n_heads * size, args.dim, parallel, unit=size)
        self.wqkv = Joined(self.wq, self.wk, self.wv)

    def forward(self, x: Tensor, cache: Tensor, step: Step) -> Tensor:
        """x (N, dim) to (N, dim). cache (2, max_batch_size, n_kv_heads, max_seq_len, head_dim)."""
        qkv = self.wqkv(x).view(len(x), -1, self.head_dim)  # (N, n_heads + 2 n_kv_heads, head_dim)
        qkv = apply_rotary(qkv, self.n_heads + self.n_kv_heads, step.rotation)
        queries, kv = qkv.split((self.n_heads, 2 * self.n_kv_heads), 1)
        return self.wo(step.attend(queries, kv.unflatten(1, (2, -1)), cache).flatten(1))


def local_kv_heads(args: ModelArgs, parallel: ModelParallel) -> list[int]:
    """The key/value heads that this rank's query heads read, in order.

    Attention needs the same number of query heads for each key head. If a rank boundary splits a
    group, heads repeat (0, 0, 1, 1, …), as few times as possible.
    """
    start, stop = parallel.span(args.n_heads)
    group = args.n_heads // args.n_kv_heads
    local_group = next(g for g in range(group, 0, -1) if group % g == start % g == stop % g == 0)
    return [head // group for head in range(start, stop, local_group)]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) · w3 x)."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(args.dim, args.hidden_dim, parallel)
        self.w2 = RowParallelLinear(args.hidden_dim, args.dim, parallel)
        self.w3 = ColumnParallelLinear(args.dim, args.hidden_dim, parallel)
        self.w13 = Joined(self.w1, self.w3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate).mul_(up))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each applied to the normed residual stream and added to it."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel) -> None:
        super().__init__()
        self.attention = Attention(args, parallel)
        self.feed_forward = FeedForward(args, parallel)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, cache: Tensor, step: Step) -> Tensor:
        x += self.attention(self.attention_norm(x), cache, step)
        x += self.feed_forward(self.ffn_norm(x))
        return x


class StepBackend(Protocol):
    """Computes whole steps instead of the layers, as `Transformer` does, with its cache and rotations."""

    def hidden(self, tokens: Tensor, rows: Sequence[Row], cache: Tensor, rotations: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def choose(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor: ...

    def next_tokens(
        self, ids: list[int], rows: Sequence[Row], draws: Sequence[Draw], cache: Tensor, rotations: Tensor
    ) -> list[int]:
        """All three for the last token of each row, in one call: most tokens need nothing in between."""


class Transformer(nn.Module):
    """A Llama model, or one rank's part of it.

    parallel: the ranks it is split across; by default fairscale's model-parallel group, or one rank.
    Raises ArgumentError if the heads do not divide evenly among the ranks.
    """

    rotations: Tensor  # (max_seq_len, 1, head_dim / 2, 2), fp32: cosines and sines
    step_backend: StepBackend | None = None
    least_rows = 1  # minimum for the linear layers: with few rows, a backend may be faster with padding
    _cache: KVCache | None = None

    def __init__(self, params: ModelArgs, parallel: ModelParallel | None = None) -> None:
        super().__init__()
        if params.vocab_size < 1:
            raise ArgumentError(f"vocab_size must be 1 or more, not {params.vocab_size}")
        self.params, self.parallel = params, parallel or current()
        if params.n_heads % self.parallel.size:
            raise ArgumentError(
                f"{params.n_heads} attention heads do not divide evenly among {self.parallel.size} ranks; "
                f"use one of {[n for n in range(1, params.n_heads + 1) if params.n_heads % n == 0]}"
            )
        self.tok_embeddings = VocabParallelEmbedding(params.vocab_size, params.dim, self.parallel)
        self.layers = nn.ModuleList(TransformerBlock(params, self.parallel) for _ in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, self.parallel)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def cache_shape(self) -> tuple[int, ...]:
        args = self.params
        n_kv_heads = len(local_kv_heads(args, self.parallel))
        return args.n_layers, 2, args.max_batch_size, n_kv_heads, args.max_seq_len, args.head_dim

    @torch.inference_mode(False)  # so that code outside inference mode can write to it too
    def allocate_cache(self) -> KVCache:
        """Allocate the KV cache and the rotation table on the weights' device."""
        positions = torch.arange(self.params.max_seq_len, device="cpu")
        angles = torch.outer(positions, rope_frequencies(self.params))
        self.rotations = torch.stack((angles.cos(), angles.sin()), -1)[:, None].to(self.device)
        self._cache = KVCache(self.cache_shape(), self.dtype, self.device)
        return self._cache

    @property
    def cache(self) -> KVCache:
        """The KV cache, allocated on first use."""
        return self._cache or self.allocate_cache()

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int | Tensor) -> Tensor:
        """Logits after each token; the tokens' keys and values are written to the cache.

        tokens: int64 (batch, length). Row i uses cache slot i.
        start_pos: position of the first column, for all rows or, as int64 (batch), for each.
        Returns fp32 (batch, length, vocab_size). Raises ArgumentError if the cache is too small.
        """
        batch, length = tokens.shape
        starts = [start_pos] * batch if isinstance(start_pos, int) else start_pos.tolist()
        rows = [Row(slot, start, length) for slot, start in enumerate(starts)]
        return self.logits(self.hidden(tokens.flatten(), rows)).view(batch, length, -1)

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, rows: Sequence[Row]) -> Tensor:
        """The last layer's normed output (N, dim) for the rows' concatenated tokens, int64 (N).

        New keys and values are written to the cache; a slot may appear in only one row. Tokens after the
        last row's are padding for the linear layers. Raises ArgumentError if a row does not fit the cache.
        """
        self.begin(rows)
        if self.step_backend:
            return self.whole_step(tokens, rows)
        n = len(tokens)
        tokens = F.pad(tokens, (0, max(0, self.least_rows - n)))
        padding = len(tokens) - sum(row.length for row in rows)
        rotation = torch.cat([self.rotations[row.start : row.stop] for row in rows])
        step = RaggedStep(rows, F.pad(rotation, (0, 0, 0, 0, 0, 0, 0, padding)))
        return self.run(tokens, step)[:n]

    def begin(self, rows: Sequence[Row]) -> None:
        """Note that these rows will be written. Raises ArgumentError if one does not fit the cache."""
        self.cache.mark_written()
        slots, length = self.params.max_batch_size, self.params.max_seq_len
        for row in rows:
            if not (0 <= row.slot < slots and 0 <= row.start < row.stop <= length):
                raise ArgumentError(
                    f"slot {row.slot}, positions {row.start} to {row.stop} do not fit the cache of "
                    f"max_batch_size={slots}, max_seq_len={length}"
                )

    def whole_step(self, tokens: Tensor, rows: Sequence[Row]) -> Tensor:
        assert self.step_backend
        return self.step_backend.hidden(tokens, rows, self.cache.data, self.rotations)

    def run(self, tokens: Tensor, step: Step) -> Tensor:
        """The last layer's normed output (N, dim) for int64 (N) tokens."""
        x = self.tok_embeddings(tokens)
        for layer, cache in zip(self.layers, self.cache.data, strict=True):
            x = layer(x, cache, step)
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (N, dim) to fp32 logits (N, vocab_size), identical on every rank."""
        if self.step_backend:
            return self.step_backend.logits(hidden)
        n = len(hidden)
        hidden = F.pad(hidden, (0, 0, 0, max(0, self.least_rows - n)))
        return self.parallel.all_gather(self.output(hidden)[:n], self.params.vocab_size).float()
