"""GGUF files of the `llama` architecture to native checkpoints, by the `gguf` package.

GGUF keeps the query and key channels of this architecture in the native order already, so a
conversion is new names, plain numbers for blocks of quantized ones, and the tokenizer.
"""

import base64
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama.checkpoint import feed_forward
from llama.model import ModelArgs, rope_frequencies
from llama.tokenizer import LLAMA3_PATTERN, Layout

NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
# How each byte-level tokenizer cuts text before merging, by the name that GGUF gives it.
PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN,
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
CONTROL, USER_DEFINED = 3, 4  # of gguf.TokenType


class GGUFError(ValueError):
    """A GGUF file that holds something other than a Llama model, or more than this package reads."""


def convert(source: str | Path, destination: str | Path) -> None:
    """Write the model of a GGUF file as a native checkpoint folder, in bf16.

    The folder appears under its name when it is complete. Raises FileNotFoundError without a file,
    FileExistsError where the destination exists, GGUFError for a file that cannot be converted.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    if destination.exists():
        raise FileExistsError(f"{destination} exists already; remove it or name another folder")
    reader = read(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    params = read_params(fields, {tensor.name: tensor for tensor in reader.tensors})
    ranks, layout = read_tokenizer(fields)

    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        weights = {name: weight.bfloat16() for name, weight in read_weights(reader)}
        torch.save(weights, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", "utf-8")
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
        (folder / "tokenizer.model").write_bytes(b"".join(lines))
        layout.write(folder / "format.json")
        shutil.move(folder, destination)


def read(path: Path) -> Any:
    """A `gguf.GGUFReader`. Raises GGUFError for another kind of file, ImportError without the package."""
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the gguf package: pip install -e '.[demo]'") from None
    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:
        raise GGUFError(f"{path} is not a GGUF file, or not whole: {error}") from None
    return reader


def read_weights(reader: Any) -> Iterator[tuple[str, Tensor]]:
    """Native names and fp32 tensors, with progress. Raises GGUFError for a tensor that Llama has not."""
    import gguf

    for tensor in tqdm(reader.tensors, desc="Converting", unit=" tensors", leave=False, disable=None):
        if tensor.name == "rope_freqs.weight":  # checked with the parameters
            continue
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        yield native_name(tensor.name), values.view([int(n) for n in reversed(tensor.shape)])


def native_name(name: str) -> str:
    """blk.0.attn_q.weight to layers.0.attention.wq.weight."""
    match = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.weight", name)
    if not match or match[2] not in NAMES:
        raise GGUFError(f"the file has a tensor {name}, which a Llama model has not")
    return f"{(match[1] or '').replace('blk', 'layers')}{NAMES[match[2]]}.weight"


def read_params(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The `params.json` of a GGUF file. Raises GGUFError where the model is not one of this package's."""
    if (architecture := fields.get("general.architecture")) != "llama":
        raise GGUFError(f"the file's architecture is {architecture!r}; only 'llama' can be read")
    if fields.get("llama.expert_count"):
        raise GGUFError("the file has llama.expert_count, a mixture of experts, which cannot be read")
    try:
        params: dict[str, Any] = {
            "dim": fields["llama.embedding_length"],
            "n_layers": fields["llama.block_count"],
            "n_heads": fields["llama.attention.head_count"],
            "n_kv_heads": fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"]),
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            **feed_forward(fields["llama.embedding_length"], fields["llama.feed_forward_length"]),
            # stored as fp32: 9.99999975e-06 was 1e-05
            "norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            "rope_theta": float(f"{fields.get('llama.rope.freq_base', 10000.0):.6g}"),
        }
    except KeyError as error:
        raise GGUFError(f"the file lacks {error.args[0]}") from None
    for key in ("llama.rope.dimension_count", "llama.attention.key_length"):
        if fields.get(key, params["dim"] // params["n_heads"]) != params["dim"] // params["n_heads"]:
            raise GGUFError(
                f"the file has {key}={fields[key]}, other than dim / n_heads, which cannot be read"
            )
    if "rope_freqs.weight" in tensors:
        # What each frequency is divided by. The largest divisor is the factor; the rest must follow.
        divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
        params |= {"use_scaled_rope": True, "rope_scaling_factor": float(divisors.max())}
        plain = rope_frequencies(ModelArgs(**{**params, "use_scaled_rope": False}))
        if not torch.allclose(plain / divisors, rope_frequencies(ModelArgs(**params)), rtol=1e-4):
            raise GGUFError("the file has rope_freqs of another kind than Llama 3.1's, which cannot be read")
    elif fields.get("llama.rope.scaling.type", "none") != "none":
        raise GGUFError(
            f"the file has llama.rope.scaling.type={fields['llama.rope.scaling.type']}, which cannot be read"
        )
    return params


def read_tokenizer(fields: Mapping[str, Any]) -> tuple[dict[bytes, int], Layout]:
    """Byte-pair ranks and layout of a file's tokenizer. Raises GGUFError for a kind that isn't read."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PATTERNS:
        raise GGUFError(
            f"the file's tokenizer is {kind!r} with {pre!r}; of 'gpt2', {', '.join(PATTERNS)} can be read"
        )
    texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = {text: i for i, text in enumerate(texts) if types[i] in (CONTROL, USER_DEFINED)}
    to_byte = byte_alphabet()
    ranks = {
        bytes(to_byte[character] for character in text): i
        for i, text in enumerate(texts)
        if text not in special
    }
    # tiktoken merges the pair whose result has the lowest id first: that must be the merges' order.
    number = {text: i for i, text in enumerate(texts)}
    merged = [number["".join(merge.split(" "))] for merge in fields["tokenizer.ggml.merges"]]
    if any(a >= b for a, b in pairwise(merged)):
        raise GGUFError("the file's merges are not in the order of their ids, which tiktoken cannot express")

    template = fields.get("tokenizer.chat_template", "")
    eos = texts[fields["tokenizer.ggml.eos_token_id"]]
    ends = [eos, "<|end_of_text|>", "<|endoftext|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>"]
    system = re.search(r"<\|im_start\|>system(?:\n|\\n)(.+?)<\|im_end\|>", template, re.DOTALL)
    return ranks, Layout(
        special_tokens=special,
        pattern=PATTERNS[pre],
        bos=texts[fields["tokenizer.ggml.bos_token_id"]]
        if fields.get("tokenizer.ggml.add_bos_token", True)
        else None,
        eos=eos,
        pad=texts[fields.get("tokenizer.ggml.padding_token_id", fields["tokenizer.ggml.eos_token_id"])],
        stop=[text for text in dict.fromkeys(ends) if text in special],
        chat_format="chatml" if "<|im_start|>" in template else "llama3",
        default_system=system[1] if system else "",
    )


def byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level tokenizers write bytes as (Radford et al. 2019)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
