"""Random checkpoints small enough to make in a moment, in the layout of Meta's files."""

import base64
import json
from pathlib import Path

import torch
from torch import Tensor

from llama.model import ModelArgs, Transformer

# 256 single bytes and a few merges, then Llama 3's 256 special tokens.
MERGES = [b"th", b"the", b" the", b"in", b"er", b"an", b"ll", b"ama"]
VOCAB = 256 + len(MERGES) + 256

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
# The dimension along which Meta's files cut each kind of weight; norms are not cut.
CUT = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "tok_embeddings": 0, "wo": 1, "w2": 1}


def random_model(seed: int = 0, std: float = 0.3, **args: object) -> Transformer:
    """A model whose logits lie far enough apart that rounding decides no token."""
    model = Transformer(ModelArgs(**{**PARAMS, "max_seq_len": 64, "max_batch_size": 4, **args}))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
        else:
            weight.copy_(std * torch.randn(weight.shape, generator=generator))
    return model


def write_tokenizer(path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + MERGES
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))


def shards(state: dict[str, Tensor], count: int, cut: dict[str, int] = CUT) -> list[dict[str, Tensor]]:
    """A whole state dict cut into `count` files as Meta's."""
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
