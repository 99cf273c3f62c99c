"""Random models, tokenizers and native checkpoints that are quick to create."""

import base64
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from llama.model import ModelArgs, Transformer
from llama.tokenizer import Layout, Tokenizer

# 256 single bytes and a few merges, then Llama 3's 256 special tokens.
MERGES = [b"th", b"the", b" the", b"in", b"er", b"an", b"ll", b"ama"]
VOCAB = 256 + len(MERGES) + 256
CHATML = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]  # of byte_tokenizer

PARAMS = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": VOCAB,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
# The dimension along which Meta's files split each kind of weight; norms are not split.
CUT = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "tok_embeddings": 0, "wo": 1, "w2": 1}


def random_model(seed: int = 0, std: float = 0.3, **args: object) -> Transformer:
    """A model whose logits are far enough apart that rounding never decides a token."""
    model = Transformer(ModelArgs(**{**PARAMS, "max_seq_len": 64, "max_batch_size": 4, **args}))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
        else:
            weight.copy_(std * torch.randn(weight.shape, generator=generator))
    return model


def small_model(
    seed: int = 0, *, std: float = 0.2, dtype: torch.dtype = torch.float32, **changes: object
) -> Transformer:
    """A random model of 2 layers, dim 32, vocabulary 64."""
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64}
    return random_model(seed, std, **{**shape, **changes}).to(dtype)


def write_ranks(path: Path, tokens: Iterable[bytes]) -> None:
    """Write a tokenizer.model with tokens in the order of their ranks."""
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))


def write_tokenizer(path: Path) -> None:
    write_ranks(path, [*(bytes([byte]) for byte in range(256)), *MERGES])


def byte_tokenizer(folder: Path, *, words: tuple[str, ...] = (), chat_format: str = "chatml") -> Tokenizer:
    """A tokenizer with single bytes and a few longer words, written to a folder and read back.

    No word may begin in the middle of another token, so each is one merge of bytes.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    for word in words:
        parts = word.encode()
        tokens += [parts[: n + 1] for n in range(1, len(parts)) if parts[: n + 1] not in tokens]
    special = {name: len(tokens) + i for i, name in enumerate(CHATML)}
    layout = Layout(
        special_tokens=special,
        pattern=r"[\s\S]+",
        bos=CHATML[0],
        eos=CHATML[1],
        pad=CHATML[1],
        stop=[CHATML[1], CHATML[3]],
        chat_format=chat_format,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_ranks(folder / "tokenizer.model", tokens)
    layout.write(folder / "format.json")
    return Tokenizer(folder / "tokenizer.model")


def shards(state: dict[str, Tensor], count: int, cut: dict[str, int] = CUT) -> list[dict[str, Tensor]]:
    """A whole state dict split into `count` files, like Meta's."""
    files: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, weight in state.items():
        kind = name.split(".")[-2]
        parts = weight.chunk(count, cut[kind]) if kind in cut else [weight] * count
        for file, part in zip(files, parts, strict=True):
            file[name] = part.clone()
    return files


def write_checkpoint(
    folder: Path,
    count: int = 1,
    *,
    cut: dict[str, int] = CUT,
    tied: bool = False,
    seed: int = 0,
    **params: object,
) -> Path:
    """A random checkpoint in `count` files, with params.json and tokenizer.model. Returns the folder."""
    folder.mkdir(parents=True)
    params = {**PARAMS, **params}
    state = dict(random_model(seed, **params).state_dict())
    if tied:
        del state["output.weight"]
    for i, file in enumerate(shards(state, count, cut)):
        torch.save(file, folder / f"consolidated.{i:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    write_tokenizer(folder / "tokenizer.model")
    return folder


def save_model(folder: Path, model: Transformer) -> None:
    """A model as a native checkpoint with a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps({name: getattr(model.params, name) for name in PARAMS}))
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
