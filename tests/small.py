"""Smaller than tiny: a model of 64 tokens, and a tokenizer of single bytes, for tests of the engine."""

import base64
import json
from pathlib import Path

import torch

from llama.model import Transformer
from llama.tokenizer import Layout, Tokenizer
from tests import tiny

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]


def tiny_model(
    seed: int = 0, *, std: float = 0.2, dtype: torch.dtype = torch.float32, **changes: object
) -> Transformer:
    """A random model of 2 layers, dim 32, vocabulary 64."""
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64}
    return tiny.random_model(seed, std, **{**shape, **changes}).to(dtype)


def byte_tokenizer(folder: Path, *, words: tuple[str, ...] = (), chat_format: str = "chatml") -> Tokenizer:
    """A tokenizer of single bytes and a few longer words, written to a folder and read from there.

    No word's beginning may lie in the middle of another token, so each is one merge of bytes.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    for word in words:
        parts = word.encode()
        tokens += [parts[: n + 1] for n in range(1, len(parts)) if parts[: n + 1] not in tokens]
    special = {name: len(tokens) + i for i, name in enumerate(SPECIAL)}
    layout = Layout(
        special_tokens=special,
        pattern=r"[\s\S]+",
        bos=SPECIAL[0],
        eos=SPECIAL[1],
        pad=SPECIAL[1],
        stop=[SPECIAL[1], SPECIAL[3]],
        chat_format=chat_format,
    )
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("".join(lines))
    layout.write(folder / "format.json")
    return Tokenizer(folder / "tokenizer.model")


def write_checkpoint(folder: Path, model: Transformer) -> None:
    """A model as the one file of a native checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    args = model.params
    names = (
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "multiple_of",
        "norm_eps",
        "rope_theta",
    )
    (folder / "params.json").write_text(json.dumps({name: getattr(args, name) for name in names}))
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
