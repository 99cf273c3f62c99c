"""Conversion from one checkpoint format to another, a part at a time.

Any source that `open_checkpoint` reads becomes native shards or a Hugging Face folder. A native shard is
assembled in memory and written; safetensors are written as they are read. So the memory that a conversion
needs does not depend on the size of the model.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from llama.checkpoint import StrPath, open_checkpoint
from llama.checkpoint.hf_export import template_of, write_hf_config, write_hf_tokenizer
from llama.checkpoint.hf_view import HFView, hf_view
from llama.checkpoint.native import file_name
from llama.checkpoint.quantized import keys
from llama.checkpoint.source import Checkpoint, Pages, check_finite, stored_weight, whole_parts
from llama.device import parse_dtype
from llama.errors import ArgumentError
from llama.files import write_json
from llama.quantization import LAYOUT, QUANTIZATIONS, QuantizedMatrix, few_bits
from llama.quantizer import quantize
from llama.tokenizer import Layout, SentencePieceTokenizer, TextTokenizer, Tokenizer
from llama.tokenizer.chat_format import chat_format
from llama.tokenizer.huggingface import TOKENIZER_FILES, HFTokenizer
from llama.tokenizer.spm import is_sentencepiece
from llama.tokenizer.template import ChatTemplate
from llama.vision import make_args

LARGEST_SHARD = 20e9  # bytes: Meta's released shards are smaller
LARGEST_FILE = 5e9  # of safetensors, as in Hugging Face's own tools
LARGEST_QUANTIZED = 1e9  # weights in a quantized file, which is held in memory until it is full
ORIGINAL_FILES = ("tokenizer.model", "format.json")  # of a native tokenizer
CHUNK = 2**25  # bytes of a tensor to read at a time
READ_AHEAD = 2**25  # bytes of mapped files to hold at a time


def convert(
    source: StrPath,
    destination: StrPath,
    to: str = "native",
    shards: int | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer_path: StrPath | None = None,
    adapter: StrPath | None = None,
    overwrite: bool = False,
    quantize: str | None = None,
    calibrate: Callable[[Checkpoint], Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Convert a checkpoint to another format or number of files, in a new folder. Returns its path.

    to: "native" or "hf".
    shards: number of weight files; by default as many as a native source has, else few of a usual size.
    dtype: of the weights, or of embeddings and norms with `quantize`; by default the source's own.
    tokenizer_path, adapter: as for `open_checkpoint`.
    overwrite: replace an existing folder.
    quantize: "int8", "int5" or "int4" for quantized native weights, which load on any number of ranks.
    calibrate: measures how much each matrix's inputs count in `quantize`, by the matrix's name (see
        `calibration.mean_squares`); by default all count the same.

    The folder appears under its name only when it is complete.
    Raises FileExistsError if it exists already, ValueError if the arguments do not fit the model, and
    what `open_checkpoint` raises.
    """
    destination = Path(destination)
    if to not in ("native", "hf"):
        raise ArgumentError(f"--to must be native or hf, not {to!r}")
    if shards is not None and (isinstance(shards, bool) or not isinstance(shards, int) or shards < 1):
        raise ArgumentError(f"--shards must be a whole number, 1 or more, not {shards!r}")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ArgumentError(
            f"--quantize must be one of {', '.join(QUANTIZATIONS)} in a conversion, not {quantize!r}"
        )
    if quantize is not None and to != "native":
        raise ArgumentError(f"--quantize {quantize} writes this runtime's own format: leave out --to {to}")
    if calibrate is not None and quantize is None:
        raise ArgumentError(
            f"--calibrate needs --quantize with {', '.join(QUANTIZATIONS[:-1])} or {QUANTIZATIONS[-1]}: it "
            "decides how weights are rounded"
        )
    if destination.exists() and not overwrite:
        raise FileExistsError(
            f"{destination} already exists; remove it, choose another folder, or pass --overwrite"
        )
    wanted = parse_dtype(dtype) if dtype is not None else None
    checkpoint = open_checkpoint(source, tokenizer_path, adapter)
    if destination.exists() and destination.resolve() == checkpoint.path.resolve():
        raise ArgumentError(f"{destination} is the source itself; choose another folder")
    if checkpoint.quantization in QUANTIZATIONS:
        raise ArgumentError(
            f"{source} holds {checkpoint.quantization} weights, whose lost precision cannot be restored: "
            "convert the folder they were quantized from"
        )
    wanted = wanted or checkpoint.weights.dtype
    write = write_native if to == "native" else write_hf
    if quantize is not None:
        spread(checkpoint.weights.shapes, shards, 1)  # refuses too many before a calibration's minutes
        importance = calibrate(checkpoint) if calibrate else {}
        write = partial(write_quantized, scheme=quantize, importance=importance)

    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        write(checkpoint, folder, shards, wanted)
        replace_folder(destination, folder, Path(scratch) / "replaced")
    return destination


def replace_folder(destination: Path, folder: Path, aside: Path) -> None:
    """Move a folder into place; if that fails or is interrupted, restore the old one."""
    try:
        if destination.exists():
            destination.rename(aside)
        folder.rename(destination)
    finally:
        if aside.exists() and not destination.exists():
            aside.rename(destination)


def write_native(checkpoint: Checkpoint, folder: Path, shards: int | None, dtype: torch.dtype) -> None:
    """Write native shards, params.json, tokenizer. Raises ValueError if `shards` does not fit the model."""
    source, args = checkpoint.weights, make_args(checkpoint.params)
    parts = whole_parts(args, source.shapes)
    if has_sentencepiece(checkpoint.tokenizer):  # as LLaMA 1 and 2 are split
        parts["tok_embeddings.weight"] = replace(parts["tok_embeddings.weight"], dim=1)
    count = shards or default_shards(checkpoint, dtype)
    for name, part in parts.items():
        if part.dim is not None and part.shape[part.dim] % count:
            size = part.shape[part.dim]
            raise ArgumentError(
                f"{name} {part.shape} does not split into {count} shards; use a divisor of {size}"
            )
    pages = Pages(source, READ_AHEAD)
    total = sum(prod(part.shape) // (count if part.dim is not None else 1) for part in parts.values())
    with _progress(total * count) as bar:
        for number in range(count):
            tensors = {}
            for name, part in parts.items():
                if part.dim is None:
                    tensor = source.read(name)
                else:
                    width = part.shape[part.dim] // count
                    tensor = source.read(name, part.dim, (number * width, (number + 1) * width))
                check_finite(name, tensor)
                # A copy, because a mapped tensor would be written with the rest of its file.
                tensors[file_name(name, args)] = tensor.to(
                    dtype, copy=True, memory_format=torch.contiguous_format
                )
                bar.update(tensor.numel())
                # Reading columns touches every page of the matrix.
                touched = tensor.nbytes * (count if part.dim == 1 else 1)
                del tensor
                pages.read(touched)
            torch.save(tensors, folder / f"consolidated.{number:02d}.pth")
            del tensors
            source.release()
    write_json(folder / "params.json", native_params(checkpoint.params))
    write_native_tokenizer(checkpoint, folder)


def write_quantized(
    checkpoint: Checkpoint,
    folder: Path,
    shards: int | None,
    dtype: torch.dtype,
    *,
    scheme: str,
    importance: Mapping[str, torch.Tensor],
) -> None:
    """Write a folder that `QuantizedShards` reads: files of whole matrices, params.json and tokenizer."""
    source = checkpoint.weights
    pages = Pages(source, READ_AHEAD)
    with _progress(sum(map(prod, source.shapes.values()))) as bar:
        for number, names in enumerate(spread(source.shapes, shards, 1, LARGEST_QUANTIZED)):
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                weight = check_finite(name, stored_weight(source, name))
                weight = quantize(weight, few_bits(scheme, name), importance.get(name))
                if isinstance(weight, QuantizedMatrix):
                    tensors.update(zip(keys(name), weight.with_mins().contiguous().tensors, strict=False))
                else:
                    # A copy, because a mapped tensor would be written with the rest of its file.
                    tensors[name] = weight.to(dtype, copy=True)
                bar.update(prod(source.shapes[name]))
                pages.read(prod(source.shapes[name]) * source.dtype.itemsize)
            torch.save(tensors, folder / f"consolidated.{number:02d}.pth")
            del tensors
            source.release()
    write_json(
        folder / "params.json",
        {**native_params(checkpoint.params), "quantization": {"scheme": scheme, "layout": LAYOUT}},
    )
    write_native_tokenizer(checkpoint, folder)


def write_native_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer of a native folder, and the chat template if it is not the tokenizer's."""
    write_tokenizer(checkpoint.tokenizer, folder)
    tokenizer, formatter = checkpoint.tokenizer, checkpoint.formatter
    usual = chat_format(tokenizer, "llama2" if isinstance(tokenizer, SentencePieceTokenizer) else None)
    if not isinstance(tokenizer, HFTokenizer) and type(usual) is not type(formatter):
        # The tokenizer alone would be mistaken for that of a model with another chat format.
        names = formatter.names if isinstance(formatter, ChatTemplate) else {}
        write_json(folder / "tokenizer_config.json", {"chat_template": template_of(formatter), **names})


def native_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """params.json with the keys that Meta's files have, and others only if the model needs them."""
    out = dict(params)
    factor = out.pop("rope_scaling_factor", None)
    if factor is not None and make_args(out).rope_scaling_factor != factor:
        out["rope_scaling_factor"] = factor
    return out


def default_shards(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """As many as a native source has, else a power of two with at least one key head per shard."""
    if checkpoint.kind == "native":
        return checkpoint.files
    size = sum(prod(shape) for shape in checkpoint.weights.shapes.values()) * dtype.itemsize
    heads, count = make_args(checkpoint.params).n_kv_heads, 1
    while size / count > LARGEST_SHARD and heads % (2 * count) == 0:
        count *= 2
    return count


def has_sentencepiece(tokenizer: TextTokenizer) -> bool:
    """Whether a tokenizer is LLaMA 1's and 2's, or has that next to it."""
    if isinstance(tokenizer, HFTokenizer):
        return (path := tokenizer.folder / "tokenizer.model").is_file() and is_sentencepiece(path)
    return isinstance(tokenizer, SentencePieceTokenizer)


def write_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write the files of a native checkpoint's tokenizer; Hugging Face's are copied unchanged."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.proto)
    elif isinstance(tokenizer, Tokenizer):
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in tokenizer.ranks.items())
        (folder / "tokenizer.model").write_bytes(b"".join(lines))
        if tokenizer.layout != Layout.llama3(len(tokenizer.ranks)):
            tokenizer.layout.write(folder / "format.json")
    elif isinstance(tokenizer, HFTokenizer):
        # If Meta's own files are included, they are in original/ or, for Llama 2, next to the others.
        for source in (tokenizer.folder, tokenizer.folder / "original"):
            copy_files(source, folder, (*TOKENIZER_FILES, *ORIGINAL_FILES))


def copy_files(source: Path, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def write_hf(checkpoint: Checkpoint, folder: Path, shards: int | None, dtype: torch.dtype) -> None:
    """Write a folder that `transformers` loads: weights, configurations, tokenizer and chat template."""
    view = hf_view(checkpoint.weights, make_args(checkpoint.params))
    files = spread(view.shapes, shards, dtype.itemsize)
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    total = sum(map(prod, view.shapes.values()))
    with _progress(total) as bar:
        for name, tensors in zip(names, files, strict=True):
            with (folder / name).open("wb") as file:
                write_safetensors(file, view, tensors, dtype, bar)
            checkpoint.weights.release()
    if len(files) > 1:
        where = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": where},
        )
    write_hf_config(checkpoint, folder, dtype)
    if isinstance(checkpoint.tokenizer, HFTokenizer):
        copy_files(checkpoint.tokenizer.folder, folder, (*TOKENIZER_FILES, *ORIGINAL_FILES))
        copy_files(checkpoint.tokenizer.folder / "original", folder / "original", ORIGINAL_FILES)
    else:
        write_hf_tokenizer(checkpoint, folder)
        if isinstance(checkpoint.tokenizer, Tokenizer):
            (folder / "original").mkdir()
            write_tokenizer(checkpoint.tokenizer, folder / "original")


def spread(
    shapes: Mapping[str, tuple[int, ...]], count: int | None, itemsize: int, largest: float = LARGEST_FILE
) -> list[list[str]]:
    """Tensor names, file by file: in `count` files of similar size, or in files of a usual size."""
    size = sum(prod(shape) for shape in shapes.values()) * itemsize
    if count is not None and count > len(shapes):
        raise ArgumentError(f"{count} shards are more than the model's {len(shapes)} tensors; use fewer")
    limit = size / count if count else largest
    files: list[list[str]] = [[]]
    written, left = 0, len(shapes)
    for name, shape in shapes.items():
        # A file ends when the sum exceeds its share, or when each remaining tensor needs its own file.
        full = (
            written >= limit * len(files) if count else files[-1] and written + prod(shape) * itemsize > limit
        )
        if files[-1] and (full or (count and left == count - len(files))):
            files.append([])
            written = written if count else 0
        files[-1].append(name)
        written += prod(shape) * itemsize
        left -= 1
    return files


def write_safetensors(
    file: BinaryIO, view: HFView, names: Iterable[str], dtype: torch.dtype, bar: tqdm[Any]
) -> None:
    """Write tensors in safetensors' format: length of the header, header, and the bytes of each tensor."""
    header: dict[str, Any] = {}
    at = 0
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    for name in names:
        shape = view.shapes[name]
        end = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    pages, head_dim = Pages(view.source, READ_AHEAD), view.args.head_dim
    for name in names:
        shape = view.shapes[name]
        rows = max(1, CHUNK // (prod(shape[1:]) * 4) // head_dim) * head_dim  # whole heads
        for start in range(0, shape[0], rows):
            tensor = check_finite(name, view.read(name, start, min(start + rows, shape[0])))
            tensor.to(dtype).contiguous().view(torch.uint8).numpy().tofile(file)
            bar.update(tensor.numel())
            del tensor
        pages.read(prod(shape) * view.source.dtype.itemsize)


def _progress(total: int) -> tqdm[Any]:
    return tqdm(total=total, desc="Converting", unit=" weights", unit_scale=True, leave=False, disable=None)
