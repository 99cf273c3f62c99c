"""The checkpoint formats, and which of them a path contains."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from llama.checkpoint.gguf import open_gguf
from llama.checkpoint.hub import fetch_repository, is_repository
from llama.checkpoint.huggingface import open_huggingface
from llama.checkpoint.lora import Adapted
from llama.checkpoint.mllama import open_mllama
from llama.checkpoint.native import open_native
from llama.checkpoint.params import read_params
from llama.checkpoint.remote import fetch, is_remote
from llama.checkpoint.source import Checkpoint, find_tokenizer
from llama.errors import ArgumentError, CheckpointError
from llama.files import read_json
from llama.quantization import QUANTIZATIONS
from llama.tokenizer.huggingface import HFTokenizer
from llama.tokenizer.template import find_template
from llama.vision import make_args

StrPath = str | os.PathLike[str]


def open_checkpoint(
    path: StrPath, tokenizer_path: StrPath | None = None, adapter: StrPath | None = None
) -> Checkpoint:
    """The checkpoint at a path, whatever its format: native, Hugging Face, or GGUF.

    tokenizer_path: a tokenizer other than the one next to the weights.
    adapter: a folder with a LoRA adapter in PEFT's format, merged into the weights as they are read.

    Raises FileNotFoundError if there is no checkpoint or a file is missing, CheckpointError if it is
    damaged, mixed, or of another architecture, ValueError for an adapter on quantized weights.
    """
    path = local_folder(path)
    tokenizer_path = None if tokenizer_path is None else local_path(tokenizer_path)
    checkpoint = _open(path, tokenizer_path)
    if adapter is not None:
        if checkpoint.quantization in QUANTIZATIONS:
            raise ArgumentError(
                f"{path} holds {checkpoint.quantization} weights, and adapters merge only into unquantized "
                "ones: pass the folder they were converted from, or quantize with the adapter: "
                "python -m llama convert SOURCE NEW --quantize ... --adapter ..."
            )
        adapted = Adapted(checkpoint.weights, local_folder(adapter), make_args(checkpoint.params))
        checkpoint = replace(checkpoint, weights=adapted)
    return checkpoint


def local_path(path: StrPath) -> Path:
    """A path, or the path of a URL's local copy."""
    return fetch(str(path)) if is_remote(path) else Path(path)


def local_folder(path: StrPath) -> Path:
    """Like `local_path`; also the folder of a Hugging Face repository, if no local folder has its name."""
    return fetch_repository(str(path)) if is_repository(path) else local_path(path)


def _open(path: Path, tokenizer_path: Path | None) -> Checkpoint:
    if not path.exists():
        raise FileNotFoundError(f"no folder {path}: pass the path of a downloaded checkpoint as ckpt_dir")
    if path.is_file():
        return open_gguf(path, tokenizer_path)
    native = any(path.glob("consolidated*.pth"))
    hugging_face = (path / "config.json").is_file() or any(path.glob("*.safetensors"))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1 and not native:
        return _open(files[0], tokenizer_path)
    if files and not native and not hugging_face:
        raise CheckpointError(
            f"{path} has several GGUF files: {', '.join(file.name for file in files)}; pass the path of one"
        )
    if native and hugging_face:
        raise CheckpointError(
            f"{path} mixes native files (consolidated.*.pth) with Hugging Face files "
            "(config.json, *.safetensors): keep one model, in one format, per folder"
        )
    if hugging_face:
        mllama = read_json(path / "config.json").get("model_type") == "mllama"
        return (open_mllama if mllama else open_huggingface)(path, tokenizer_path)
    params, tokenizer = read_params(path), None
    if (path / "tokenizer_config.json").is_file():
        # A converted folder: it keeps the source's tokenizer and chat template.
        if tokenizer_path is None and (path / "tokenizer.json").is_file():
            tokenizer = HFTokenizer(path, params.get("vocab_size", 0))
        found = tokenizer or find_tokenizer(path, tokenizer_path)
        return open_native(path, found, find_template(path, found))
    return open_native(path, find_tokenizer(path, tokenizer_path))
