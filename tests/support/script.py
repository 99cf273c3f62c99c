"""A model that recites a given answer, and another one once a tool has answered.

Its weights are written by hand: each token of a script is followed by the next one, whatever stands before.
One attention head looks for <|eom_id|>, with which a tool call in a prompt ends, and if there is one, another
script begins.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch

from llama import Llama
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Layout, Tokenizer
from tests.support.tiny import write_ranks


def cut(text: str, used: set[bytes]) -> list[bytes]:
    """A text in pieces of two bytes or more, none of which has been used before."""
    data, pieces = text.encode(), []
    while data:
        size = next(n for n in range(2, len(data) + 2) if data[:n] not in used)
        size = len(data) if len(data) - size < 2 else size
        pieces.append(data[:size])
        used.add(data[:size])
        data = data[size:]
    return pieces


def scripted(first: str, after_tool: str = "", **build: object) -> Llama:
    """A Llama with Llama 3's chat format.

    first: its answer.
    after_tool: its answer to a dialog with a tool call in it.
    build: arguments for `Llama`.
    """
    used: set[bytes] = set()
    scripts = [cut(text, used) for text in (first, after_tool or " ")]
    tokens = [bytes([byte]) for byte in range(256)] + [piece for script in scripts for piece in script]
    ranks = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer.from_ranks(ranks, Layout.llama3(len(ranks)))
    newline, eom, eot = ranks[b"\n"], *(tokenizer.special_tokens[f"<|{name}_id|>"] for name in ("eom", "eot"))
    said = [newline, *(ranks[piece] for script in scripts for piece in script)]
    dim = 16 * -(-(len(said) + 4) // 16)
    # Dimensions of the hidden state: one for each token recited, and these.
    codes = {token: i for i, token in enumerate(said)}
    other, always, is_eom, was_eom = range(len(said), len(said) + 4)
    args = ModelArgs(
        dim=dim, n_layers=1, n_heads=1, vocab_size=tokenizer.n_words, max_seq_len=4096, max_batch_size=4
    )
    model = Transformer(args)
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    embeddings, attention = model.tok_embeddings.weight, model.layers[0].attention
    for token in range(tokenizer.n_words):
        embeddings[token, codes.get(token, other)] = 1
        embeddings[token, always] = 1
    embeddings[eom, is_eom] = 1
    # The last two dimensions of a head rotate slowest with the position.
    attention.wq.weight[-2, always] = 30
    attention.wk.weight[-2, is_eom] = 30
    attention.wv.weight[0, is_eom] = 1
    attention.wo.weight[was_eom, 0] = 1
    for number, script in enumerate(scripts):
        ids = [newline, *(ranks[piece] for piece in script), eot]
        for before, after in pairwise(ids):
            model.output.weight[after, codes[before]] = 8 if before != newline or number else 10
    model.output.weight[ranks[scripts[1][0]], was_eom] = 1  # enough for the second script's beginning
    with torch.no_grad():
        model.requires_grad_(False)
    return Llama(model, tokenizer, **build)


def save_scripted(folder: Path, llama: Llama) -> Path:
    """A model without `after_tool` as a native checkpoint, for one rank or two. Returns the folder."""
    folder.mkdir(parents=True)
    tokenizer, args = llama.tokenizer, llama.model.params
    ordinary = tokenizer.n_words - len(tokenizer.special_tokens)
    write_ranks(folder / "tokenizer.model", (tokenizer.decode_bytes([i]) for i in range(ordinary)))
    names = ("dim", "n_layers", "vocab_size", "multiple_of", "norm_eps", "rope_theta")
    # Its head sees nothing without a tool call, so there may as well be two of half the size, and
    # positions scaled as in the Llamas that Llama Guard 3 is made of.
    params = {name: getattr(args, name) for name in names} | {"n_heads": 2, "use_scaled_rope": True}
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(llama.model.state_dict(), folder / "consolidated.00.pth")
    return folder
