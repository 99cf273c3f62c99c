"""What a checkpoint is, and what it takes to run it."""

from __future__ import annotations

from math import prod

import torch

from llama.checkpoint import StrPath, open_checkpoint
from llama.device import gigabytes, parse_dtype
from llama.errors import ArgumentError
from llama.loading import scheme_of
from llama.model import ModelArgs
from llama.parallel import ModelParallel
from llama.quantization import SCHEMES, weight_bytes
from llama.tokenizer import DialogFormat, SentencePieceTokenizer, TextTokenizer, Tokenizer
from llama.tokenizer.chat_format import ChatFormat, ChatML, Llama2Chat, NoChat
from llama.vision import VisionArgs, VisionTransformer, make_args, make_model


def describe(
    path: StrPath,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    dtype: str | None = None,
    quantize: str | None = None,
    tokenizer_path: StrPath | None = None,
    adapter: StrPath | None = None,
    max_images: int = 1,
) -> str:
    """A checkpoint's family, shapes, files and tokenizer, and the memory it takes, as lines of text.

    max_seq_len, max_batch_size: of the KV cache. dtype: weights and cache are loaded in, by default
    the files' own. max_images: of a sequence, that the cache of a vision model has room for.
    quantize: of the weights, "int8", "int4" or "fp8"; by default as the files have them.
    Raises ValueError for other arguments, and what `open_checkpoint` raises.
    """
    if quantize is not None and quantize not in SCHEMES:
        raise ArgumentError(f"--quantize must be one of {', '.join(SCHEMES)}, not {quantize!r}")
    checkpoint = open_checkpoint(path, tokenizer_path, adapter)
    quantize = scheme_of(checkpoint, quantize)
    stored = checkpoint.weights.dtype
    kinds = str(stored).removeprefix("torch.")
    if checkpoint.quantization:
        kinds = f"weights {checkpoint.quantization}, others {kinds}"
    loaded = parse_dtype(dtype) if dtype is not None else stored
    args = make_args(
        checkpoint.params, max_seq_len=max_seq_len, max_batch_size=max_batch_size, max_images=max_images
    )
    tied = "output.weight" not in checkpoint.weights.shapes
    parameters = sum(prod(shape) for shape in checkpoint.weights.shapes.values())
    scaling = f", scaled by {args.rope_scaling_factor:g}" if args.use_scaled_rope else ""
    context = f"{checkpoint.context:,} tokens" if checkpoint.context else "not in the files"
    rows = [
        ("family", f"{checkpoint.family}, {checkpoint.kind} format"),
        ("parameters", f"{parameters:,}"),
        ("shape", f"dim {args.dim}, {args.n_layers} layers, feed-forward {args.hidden_dim}"),
        ("heads", f"{args.n_heads}, key/value heads {args.n_kv_heads}, head_dim {args.head_dim}"),
        ("vocabulary", f"{args.vocab_size:,}{', output tied to the embeddings' if tied else ''}"),
        ("rope", f"theta {args.rope_theta:g}{scaling}"),
        ("files", f"{checkpoint.files}, {kinds}"),
        ("tokenizer", describe_tokenizer(checkpoint.tokenizer)),
        ("chat format", describe_format(checkpoint.formatter)),
        ("context", context),
        ("world sizes", ", ".join(map(str, world_sizes(args)))),
    ]
    if isinstance(args, VisionArgs):
        rows[5:5] = describe_vision(args)
    lines = [f"{name:<12} {value}" for name, value in rows]
    how = str(loaded).removeprefix("torch.") + (f", weights {quantize}" if quantize else "")
    lines.append(
        f"\nMemory per rank in {how}, at max_seq_len {max_seq_len}, max_batch_size {max_batch_size}"
        + (f", max_images {max_images}:" if isinstance(args, VisionArgs) else ":")
    )
    lines.append(f"{'ranks':>7} {'weights':>12} {'KV cache':>12} {'together':>12}")
    for size in world_sizes(args):
        weights, cache = memory(args, size, loaded, tied, quantize)
        sizes = (gigabytes(n) for n in (weights, cache, weights + cache))
        lines.append(f"{size:>7} " + " ".join(f"{text:>12}" for text in sizes))
    return "\n".join(lines)


def world_sizes(args: ModelArgs) -> list[int]:
    """The numbers of ranks that a model can be cut across."""
    return [size for size in range(1, args.n_heads + 1) if args.n_heads % size == 0]


def memory(
    args: ModelArgs, size: int, dtype: torch.dtype, tied: bool, quantize: str | None = None
) -> tuple[int, int]:
    """Bytes of weights and of KV cache on the first of `size` ranks."""
    with torch.device("meta"):
        model = make_model(args, ModelParallel(0, size))
    weights = weight_bytes(model, dtype, quantize)
    if tied and not quantize:
        weights -= model.output.weight.numel() * dtype.itemsize
    cache = prod(model.cache_shape())
    if isinstance(model, VisionTransformer):
        cache += prod(model.image_cache_shape())
    return weights, cache * dtype.itemsize


def describe_vision(args: VisionArgs) -> list[tuple[str, str]]:
    side, layers = args.vision_chunk_size, f"{args.vision_layers} + {args.vision_global_layers} layers"
    return [
        ("images", f"up to {args.vision_max_num_chunks} tiles of {side} × {side} pixels"),
        ("encoder", f"dim {args.vision_dim}, {layers}"),
        ("cross-attn", f"before layers {', '.join(map(str, args.fusion))}"),
    ]


def describe_tokenizer(tokenizer: TextTokenizer) -> str:
    kinds = {Tokenizer: "tiktoken", SentencePieceTokenizer: "sentencepiece"}
    kind = kinds.get(type(tokenizer), "tokenizer.json")
    return f"{kind}, {tokenizer.n_words:,} tokens, bos {tokenizer.bos_id}, stops at {tokenizer.stop_tokens}"


def describe_format(formatter: DialogFormat) -> str:
    names = {ChatFormat: "llama3", Llama2Chat: "llama2", ChatML: "chatml", NoChat: "none (a base model)"}
    return names.get(type(formatter), "its own template")
