"""The cost of quantization, here and in llama.cpp: python benchmarks/quality.py CKPT TEXT

Prints, for each kind of weights, the layers' bits per weight, the memory of all weights, and the mean
negative log-likelihood (NLL) of the text's tokens, over the same windows of the same tokens. llama.cpp is
skipped if it is not installed. Weights that have been quantized before favour whoever quantizes them in the
same groups; --permute measures an equivalent model with other groups.
"""

import argparse
import importlib.util
import math
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from models import quantize_gguf, read, write_gguf
from torch import Tensor

from llama import Llama
from llama.calibration import mean_squares
from llama.checkpoint.convert import convert
from llama.cli.perplexity import negative_log_likelihoods, windows
from llama.device import resident_bytes
from llama.model import Transformer

OURS: tuple[str | None, ...] = (None, "int8", "int5", "int4")
PEERS = ("bf16", "Q8_0", "Q5_0", "Q4_1", "Q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ckpt", type=Path, help="a native checkpoint in one file")
    parser.add_argument("text", type=Path, help="in UTF-8")
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--permute", action="store_true", help="measure an equivalent model")
    parser.add_argument("--calibrate", type=Path, help="a second text, for weights calibrated with it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.permute:
            permute(options.ckpt, Path(folder) / "permuted")
            options.ckpt = Path(folder) / "permuted"
        compare(
            options.ckpt, options.text.read_text("utf-8"), options.window, Path(folder), options.calibrate
        )


def compare(ckpt: Path, text: str, window: int, folder: Path, calibrate: Path | None) -> None:
    """Print the table. folder: for files that are needed meanwhile."""
    sources: dict[str, tuple[Path, str | None]] = {
        f"this runtime, {scheme or 'bf16'}": (ckpt, scheme) for scheme in OURS
    }
    if calibrate:
        measure = partial(mean_squares, text=calibrate.read_text("utf-8"))
        for scheme in filter(None, OURS):
            path = convert(ckpt, folder / scheme, quantize=scheme, calibrate=measure)
            sources[f"this runtime, {scheme}, calibrated"] = path, None
    print("| weights | bits per weight, layers | memory, MB | NLL | against bf16 |\n|---|---|---|---|---|")
    exact, tokens = math.nan, []
    for name, (path, quantize) in sources.items():
        with Llama.build(path, None, window, 1, quantize=quantize) as llama:
            tokens = llama.tokenizer.encode(text, bos=True, eos=False)
            scores = negative_log_likelihoods(llama, tokens, window // 2)
            bits, size = our_size(llama.model)
        exact = sum(scores) / len(scores) if math.isnan(exact) else exact
        print_row(name, bits, size, scores, exact)
    if missing := [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]:
        print(f"llama.cpp: skipped, because {' and '.join(missing)} is not installed", file=sys.stderr)
        return
    source = folder / "bf16.gguf"
    write_gguf(ckpt, source)
    for kind in PEERS:
        path = folder / f"{kind}.gguf"
        if kind != "bf16":
            quantize_gguf(source, path, kind)
        print_row(f"llama.cpp, {kind}", *gguf_size(path), llama_cpp_scores(path, tokens, window), exact)


def permute(source: Path, folder: Path, seed: int = 0) -> None:
    """Write an equivalent checkpoint with hidden channels in another order, and so in other groups.

    These are the channels between layers, inside each feed-forward, and of each head's values.
    """
    args, tensors = read(source)
    generator = torch.Generator().manual_seed(seed)

    def order(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)

    heads = args.n_heads // args.n_kv_heads
    channels = order(args.dim)
    for layer in range(args.n_layers):
        inner = order(args.hidden_dim)
        values = torch.stack([order(args.head_dim) + i * args.head_dim for i in range(args.n_kv_heads)])
        # Query heads that share a key head read the same values.
        read_by = values.repeat_interleave(heads, 0) % args.head_dim
        read_by += torch.arange(args.n_heads)[:, None] * args.head_dim
        for matrix, dim, places in (
            ("feed_forward.w1", 0, inner),
            ("feed_forward.w3", 0, inner),
            ("feed_forward.w2", 1, inner),
            ("attention.wv", 0, values.flatten()),
            ("attention.wo", 1, read_by.flatten()),
        ):
            name = f"layers.{layer}.{matrix}.weight"
            tensors[name] = tensors[name].index_select(dim, places)
    for name, tensor in tensors.items():
        between = 0 if tensor.dim() == 1 or name.endswith(("wo.weight", "w2.weight")) else 1
        tensors[name] = tensor.index_select(between, channels)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.pth"))
    torch.save(tensors, folder / "consolidated.00.pth")


def print_row(name: str, bits: float, size: int, scores: Sequence[float], exact: float) -> None:
    nll = sum(scores) / len(scores)
    print(f"| {name} | {bits:.2f} | {size / 1e6:.0f} | {nll:.4f} | {nll / exact - 1:+.2%} |", flush=True)


def our_size(model: Transformer) -> tuple[float, int]:
    """The layers' bits per weight, and the bytes of all weights."""
    with torch.device("meta"):
        layers = Transformer(model.params).layers
    weights = sum(weight.numel() for weight in layers.parameters())
    return resident_bytes(model.layers) * 8 / weights, resident_bytes(model)


def gguf_size(path: Path) -> tuple[float, int]:
    """Like `our_size`, for a file; also prints its tensors' kinds to stderr."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    kinds = Counter(f"{t.name.split('.')[-2]} {t.tensor_type.name}" for t in tensors if len(t.shape) == 2)
    print(f"{path.name}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()), file=sys.stderr)
    layers = [tensor for tensor in tensors if tensor.name.startswith("blk.")]
    bits = 8 * sum(int(t.n_bytes) for t in layers) / sum(int(t.n_elements) for t in layers)
    return bits, sum(int(t.n_bytes) for t in tensors)


def llama_cpp_scores(path: Path, tokens: Sequence[int], window: int) -> list[float]:
    """Like `negative_log_likelihoods`, with llama.cpp's C API."""
    import llama_cpp as cpp
    import numpy as np
    from engines import silence

    silence(cpp)
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(bytes(path), cpp.llama_model_default_params())
    params = cpp.llama_context_default_params()
    params.n_ctx, params.n_batch = window, 512
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    context = cpp.llama_init_from_model(model, params)
    vocab_size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    batch = cpp.llama_batch_init(512, 0, 1)

    scores: list[float] = []
    for start, stop, scored in windows(len(tokens), window, window // 2):
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        for first in range(start, stop, 512):
            part = tokens[first : min(first + 512, stop)]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, first - start + i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if cpp.llama_decode(context, batch):
                raise RuntimeError("llama.cpp could not decode")
            logits = np.ctypeslib.as_array(cpp.llama_get_logits(context), (len(part), vocab_size))
            # Row i predicts the next token, which only some windows score.
            rows = range(max(scored - 1, first), min(first + len(part), stop - 1))
            wanted = torch.tensor([tokens[row + 1] for row in rows], dtype=torch.int64)
            predicted = torch.from_numpy(logits)[rows.start - first : rows.stop - first]
            scores += torch.nn.functional.cross_entropy(predicted, wanted, reduction="none").tolist()
    cpp.llama_batch_free(batch)
    cpp.llama_free(context)
    cpp.llama_model_free(model)
    return scores


if __name__ == "__main__":
    main()
