"""The same weights as a native folder, a Hugging Face folder and GGUF files, one for each engine.

A random model of Llama 3.2 1B's shape replaces weights that may not be shared, because speed depends only
on shapes. Peers need no tokenizer, because the benchmark passes token ids.
"""

import json
import shutil
from collections.abc import Collection
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.convert import convert
from llama.checkpoint.gguf import NAMES
from llama.checkpoint.native import find_shards
from llama.checkpoint.params import read_params
from llama.checkpoint.source import read_shard
from llama.model import ModelArgs, Transformer

RANDOM_1B = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.5,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def random_model(
    folder: Path, params: dict[str, Any] = RANDOM_1B, tokenizer: Path | None = None, seed: int = 0
) -> None:
    """Write a native folder with random bf16 weights and tied embeddings.

    tokenizer: a native folder to copy it from; by default Llama 3's.
    """
    with torch.device("meta"):
        model = Transformer(ModelArgs(**params))
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    del shapes["output.weight"]
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if "norm" in name
        else torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    if tokenizer is None:
        import llama_models

        tokenizer = Path(llama_models.__file__).parent / "llama3"
    for name in ("tokenizer.model", "format.json"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder)


def read(folder: Path) -> tuple[ModelArgs, dict[str, Tensor]]:
    (shard,) = find_shards(folder)  # a ValueError here: only models in a single file are compared
    return ModelArgs(**read_params(folder)), read_shard(shard)


def renamed(name: str, names: dict[str, str], layer: str) -> str:
    """The name in another format of a native tensor."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{names[stem]}.weight"
    _, number, kind = stem.split(".", 2)
    return f"{layer}.{number}.{names[kind]}.weight"


def write_hf(native: Path, folder: Path) -> None:
    """A Hugging Face folder, as `python -m llama convert --to hf` writes it."""
    convert(native, folder, to="hf")


def write_gguf(native: Path, path: Path, hf: Path | None = None) -> None:
    """A bf16 GGUF file, with a vocabulary if the model's Hugging Face folder is there to copy it from."""
    import gguf

    args, tensors = read(native)
    names = {ours: theirs for theirs, ours in NAMES.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(args.n_layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_vocab_size(args.vocab_size)
    if hf:
        add_vocabulary(writer, hf)
    else:
        writer.add_tokenizer_model("no_vocab")
    for name, weight in tensors.items():
        name = renamed(name, names, "blk")
        if weight.dim() == 1:
            writer.add_tensor(name, weight.float().numpy())
        else:
            data = weight.bfloat16().contiguous().view(torch.int16).numpy()
            writer.add_tensor(name, data.view("uint8"), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: Any, hf: Path) -> None:
    """The byte-level BPE and the chat template of a Hugging Face folder."""
    import gguf

    tokenizer = json.loads((hf / "tokenizer.json").read_text("utf-8"))
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = sorted((tokenizer["model"]["vocab"] | special).items(), key=itemgetter(1))
    writer.add_tokenizer_model("gpt2")
    # llama.cpp has its own names for the patterns that split text.
    writer.add_tokenizer_pre(
        "llama-bpe" if r"\\p{N}{1,3}" in json.dumps(tokenizer["pre_tokenizer"]) else "smollm"
    )
    writer.add_token_list([text for text, _ in ids])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if text in special else kinds.NORMAL for text, _ in ids])
    gguf.SpecialVocab(hf, load_merges=True, n_vocab=len(ids)).add_to_gguf(writer)


def quantize_gguf(source: Path, path: Path, kind: str) -> None:
    """A copy of a GGUF file, quantized by llama.cpp as `kind`: Q8_0, Q4_0 or Q4_1."""
    import llama_cpp
    from engines import silence

    silence(llama_cpp)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(bytes(source), bytes(path), params):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {kind}")


def prepare(
    folder: Path,
    native: Path | None,
    ggufs: Collection[str],
    schemes: Collection[str] = (),
    hf: bool = True,
) -> None:
    """Write whichever of folder/native, folder/hf, folder/int8 (or 4) and folder/….gguf is missing.

    native: a checkpoint to use instead of a random one.
    ggufs: llama.cpp's kinds (bf16, Q8_0, Q4_0, Q4_1).
    schemes: for quantized native weights, int8 or int4.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "native").is_dir():
        if native is None:
            random_model(folder / "native")
        else:
            (folder / "native").symlink_to(native.resolve())
    if hf and not (folder / "hf").is_dir():
        write_hf(folder / "native", folder / "hf")
    for scheme in schemes:
        if not (folder / scheme).is_dir():
            convert(folder / "native", folder / scheme, quantize=scheme)
    bf16 = folder / "bf16.gguf"
    for kind in sorted(set(filter(None, ggufs)), reverse=True):
        if not bf16.is_file():
            write_gguf(folder / "native", bf16)
        if not (folder / f"{kind}.gguf").is_file():
            quantize_gguf(bf16, folder / f"{kind}.gguf", kind)
