"""What a checkpoint is, and what it needs to run."""

from json import dumps
from math import prod
from typing import Any, Literal

import torch

from llama import backends
from llama.checkpoint import StrPath, open_checkpoint
from llama.checkpoint.source import TensorSource, is_tied
from llama.device import default_device, gigabytes, parse_dtype
from llama.errors import ArgumentError
from llama.loading import scheme_of, weight_bytes
from llama.model import ModelArgs
from llama.parallel import ModelParallel
from llama.quantization import SCHEMES
from llama.tokenizer import DialogFormat, SentencePieceTokenizer, TextTokenizer, Tokenizer
from llama.tokenizer.chat_format import ChatFormat, ChatML, Llama2Chat, NoChat
from llama.tools.use import default_format
from llama.vision import VisionArgs, VisionTransformer, make_args, make_model

TOOLS = {None: "not trained to call tools", "template": "in the format of its own template"}


def info(
    ckpt_dir: str,
    *,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    dtype: str | None = None,
    quantize: Literal["int8", "int5", "int4", "fp8"] | None = None,
    tokenizer_path: str | None = None,
    adapter: str | None = None,
    max_images: int = 1,
    json: bool = False,
) -> None:
    """Show what a checkpoint is and how much memory it needs.

    Args:
        ckpt_dir: folder of a checkpoint, a GGUF file, a URL, or a Hugging Face repository
        max_seq_len: tokens per sequence in the KV cache
        max_batch_size: sequences in the KV cache
        dtype: bfloat16, float16 or float32; by default that of the files
        quantize: quantization of the weights; by default that of the files
        tokenizer_path: a tokenizer other than the checkpoint's own
        adapter: folder of a LoRA adapter in PEFT's format
        max_images: images per sequence in the cache of a vision model
        json: print one JSON object, with memory in bytes
    """
    cache = max_seq_len, max_batch_size
    found = inspect(ckpt_dir, *cache, dtype, quantize, tokenizer_path, adapter, max_images)
    print(dumps(found, ensure_ascii=False) if json else as_text(found))


def inspect(
    path: StrPath,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    dtype: str | None = None,
    quantize: str | None = None,
    tokenizer_path: StrPath | None = None,
    adapter: StrPath | None = None,
    max_images: int = 1,
) -> dict[str, Any]:
    """A checkpoint's family, shapes, files and tokenizer, and the memory it needs, ready for JSON.

    max_seq_len, max_batch_size, max_images: of the KV cache.
    dtype: of weights and cache once loaded; by default the files' own.
    quantize: of the weights, "int8", "int5", "int4" or "fp8"; by default as stored in the files.

    Raises ArgumentError for invalid arguments, and what `open_checkpoint` raises.
    """
    if quantize is not None and quantize not in SCHEMES:
        raise ArgumentError(f"quantize must be one of {', '.join(SCHEMES)}, not {quantize!r}")
    checkpoint = open_checkpoint(path, tokenizer_path, adapter)
    quantize = scheme_of(checkpoint, quantize)
    stored = checkpoint.weights.dtype
    loaded = parse_dtype(dtype) if dtype is not None else stored
    args = make_args(checkpoint.params, max_seq_len, max_batch_size, max_images)
    source = checkpoint.weights
    sizes = {n: memory(args, n, source, loaded, quantize) for n in world_sizes(args)}
    image = {"image": args.activations * loaded.itemsize} if isinstance(args, VisionArgs) else {}
    return {
        "family": checkpoint.family,
        "format": checkpoint.kind,
        "parameters": sum(prod(shape) for shape in checkpoint.weights.shapes.values()),
        "dim": args.dim,
        "n_layers": args.n_layers,
        "hidden_dim": args.hidden_dim,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "tied_output": is_tied(source.shapes),
        "rope_theta": args.rope_theta,
        "rope_scaling_factor": args.rope_scaling_factor if args.use_scaled_rope else None,
        "files": checkpoint.files,
        "stored": {"dtype": dtype_name(stored), "weights": checkpoint.quantization},
        "tokenizer": describe_tokenizer(checkpoint.tokenizer),
        "chat_format": describe_format(checkpoint.formatter),
        "tool_format": default_format(checkpoint.family, checkpoint.formatter),
        "context": checkpoint.context,
        "vision": describe_vision(args) if isinstance(args, VisionArgs) else None,
        "loaded": {
            "dtype": dtype_name(loaded),
            "weights": quantize,
            "max_seq_len": max_seq_len,
            "max_batch_size": max_batch_size,
        },
        "memory": [
            {"ranks": n, "weights": weights, "kv_cache": cache, **image}
            for n, (weights, cache) in sizes.items()
        ],
    }


def as_text(found: dict[str, Any]) -> str:
    """What `inspect` found, as lines of text."""
    scaling, context, stored, loaded = (
        found[name] for name in ("rope_scaling_factor", "context", "stored", "loaded")
    )
    kinds = f"weights {stored['weights']}, others {stored['dtype']}" if stored["weights"] else stored["dtype"]
    shape, heads = (
        "dim {dim}, {n_layers} layers, feed-forward {hidden_dim}",
        "{n_heads}, key/value heads {n_kv_heads}, head_dim {head_dim}",
    )
    rows = [
        ("family", f"{found['family']}, {found['format']} format"),
        ("parameters", f"{found['parameters']:,}"),
        ("shape", shape.format(**found)),
        ("heads", heads.format(**found)),
        ("vocabulary", f"{found['vocab_size']:,}{', output tied to the embeddings' * found['tied_output']}"),
        ("rope", f"theta {found['rope_theta']:g}{f', scaled by {scaling:g}' if scaling else ''}"),
        ("files", f"{found['files']}, {kinds}"),
        ("tokenizer", "{kind}, {tokens:,} tokens, bos {bos}, stops at {stop}".format(**found["tokenizer"])),
        ("chat format", found["chat_format"] or "none (a base model)"),
        ("tools", TOOLS.get(found["tool_format"], found["tool_format"])),
        ("context", f"{context:,} tokens" if context else "not stated in the files"),
        ("world sizes", ", ".join(str(row["ranks"]) for row in found["memory"])),
    ]
    kept = ""
    if vision := found["vision"]:
        images = "up to {max_tiles} tiles of {tile_size} × {tile_size}, encoder dim {dim}, {layers} layers"
        before = ", ".join(map(str, vision["before_layers"]))
        rows[6:6] = [("images", images.format(**vision)), ("cross-attn", f"before layers {before}")]
        kept = f", max_images {vision['max_images']}"
    how = loaded["dtype"] + (f", weights {loaded['weights']}" if loaded["weights"] else "")
    return "\n".join(
        [
            *(f"{name:<12} {value}" for name, value in rows),
            f"\nMemory per rank in {how}, at max_seq_len {loaded['max_seq_len']}, "
            f"max_batch_size {loaded['max_batch_size']}{kept}:",
            _columns("ranks", "weights", "KV cache", *["one image"] * bool(vision), "together"),
            *(_memory_row(**row) for row in found["memory"]),
        ]
    )


def _memory_row(ranks: int, **parts: int) -> str:
    return _columns(str(ranks), *map(gigabytes, (*parts.values(), sum(parts.values()))))


def _columns(first: str, *others: str) -> str:
    return f"{first:>7} " + " ".join(f"{text:>12}" for text in others)


def world_sizes(args: ModelArgs) -> list[int]:
    """The numbers of ranks that a model can be split across."""
    return [size for size in range(1, args.n_heads + 1) if args.n_heads % size == 0]


def memory(
    args: ModelArgs, size: int, source: TensorSource, dtype: torch.dtype, quantize: str | None = None
) -> tuple[int, int]:
    """Bytes of weights and of KV cache on the first of `size` ranks, on this machine's default device."""
    with torch.device("meta"):
        model = make_model(args, ModelParallel(0, size))
    plan = backends.plan(model, default_device(), dtype, quantize)
    cache = prod(model.cache_shape())
    if isinstance(model, VisionTransformer):
        cache += prod(model.image_cache_shape())
    return weight_bytes(model, source, plan, dtype, quantize), cache * dtype.itemsize


def describe_vision(args: VisionArgs) -> dict[str, Any]:
    return {
        "tile_size": args.vision_chunk_size,
        "max_tiles": args.vision_max_num_chunks,
        "dim": args.vision_dim,
        "layers": args.vision_layers + args.vision_global_layers,
        "before_layers": args.fusion,
        "max_images": args.max_images,
    }


def describe_tokenizer(tokenizer: TextTokenizer) -> dict[str, Any]:
    kinds = {Tokenizer: "tiktoken", SentencePieceTokenizer: "sentencepiece"}
    return {
        "kind": kinds.get(type(tokenizer), "tokenizer.json"),
        "tokens": tokenizer.n_words,
        "bos": tokenizer.bos_id,
        "stop": [*tokenizer.stop_tokens],
    }


def describe_format(formatter: DialogFormat) -> str | None:
    """The name of a chat format; None for a base model's."""
    names = {ChatFormat: "llama3", Llama2Chat: "llama2", ChatML: "chatml", NoChat: None}
    return names.get(type(formatter), "its own template")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
