"""How the cost grows with the work: python benchmarks/curves.py FOLDER

Decode against batch and live context, prefill against prompt length, load time and memory against model
size; the first three with the limit set by this machine's memory bandwidth and matrix rate. Each is
measured in its own process, alternating over several rounds; the tables show medians. FOLDER is that of
run.py, whose model this measures; models of several sizes are written to it. Files are read from the
page cache if they fit.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engines import generator
from harness import clock, in_process, machine, markdown, random_prompts, save, weights
from models import RANDOM_1B, prepare, random_model

from llama import Llama
from llama.checkpoint.params import read_params
from llama.cli.bench import bytes_per_step, matrix_rate, memory_bandwidth, peak_resident, prefill_flops

CPU = torch.device("cpu")
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SIZES: tuple[dict[str, Any], ...] = (
    {"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3},
    {"dim": 1024, "n_layers": 16, "n_heads": 16, "n_kv_heads": 8},
    {"dim": 1536, "n_layers": 16, "n_heads": 24, "n_kv_heads": 8},
    {"ffn_dim_multiplier": RANDOM_1B["ffn_dim_multiplier"]},
)
PROMPT, NEW = 64, 16
# For each curve: its x axis, and the meaning of its dashed line.
CURVES = {
    "decode, tok/s": ("batch", "this machine's limit"),
    "step, ms": ("live context", "this machine's limit"),
    "prefill, tok/s": ("prompt length", "this machine's limit"),
    "load, s": ("weights, GB", None),
    "memory, GB": ("weights, GB", "the weights alone"),
}
Point = tuple[str, float, float, float | None]  # curve, x, y, and y of the dashed line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the weights")
    parser.add_argument(
        "--native", type=Path, help="a native checkpoint in one file, instead of a random one"
    )
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--longest", type=int, default=CONTEXTS[-1], help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="by default PyTorch's choice")
    parser.add_argument("--save", type=Path, help="PATH.md, .json and .png; by default FOLDER/curves")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)  # run as the process for one kind
    parser.add_argument("--ckpt_dir", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(list(KINDS[options.measure](options.ckpt_dir, options.longest))))
        return
    native = options.folder / "native"
    prepare(options.folder, options.native, [], hf=False)
    work = [(kind, native) for kind in options.only if kind != "load"]
    if "load" in options.only:
        work += [("load", folder) for folder in models_of_all_sizes(native, options.folder / "sizes")]
    points: dict[str, dict[float, list[tuple[float, float | None]]]] = defaultdict(lambda: defaultdict(list))
    for number in range(options.rounds):
        for kind, folder in work:
            print(f"round {number + 1} of {options.rounds}: {kind}, {folder.name}", file=sys.stderr)
            found: list[Point] | None = in_process("--measure", kind, "--ckpt_dir", folder)
            if found is None:
                sys.exit(f"error: measuring {kind} failed")
            for curve, place, value, limit in found:
                points[curve][place].append((value, limit))
    curves = {curve: {place: medians(pairs) for place, pairs in xs.items()} for curve, xs in points.items()}
    about = f"{weights(native)}; {machine()}; medians of {options.rounds} rounds"
    lines = []
    for curve, xs in curves.items():
        against, dashed = CURVES[curve]
        rows = [[curve, *(value for value, _ in xs.values())]]
        if dashed:
            rows.append([dashed, *(limit for _, limit in xs.values())])
        lines += [
            markdown([against, *(f"{place:.3g}" if place < 10 else f"{place:.0f}" for place in xs)], rows),
            "",
        ]
    save(
        options.save or options.folder / "curves",
        "\n".join([*lines, about, ""]),
        {"about": about, "curves": {curve: [[x, *y] for x, y in xs.items()] for curve, xs in curves.items()}},
        lambda pyplot, path: draw(pyplot, path, curves, about),
    )


def medians(pairs: list[tuple[float, float | None]]) -> list[float | None]:
    """The median value, and a limit so that their ratio is the median of the rounds' ratios."""
    value = statistics.median(value for value, _ in pairs)
    ratios = [limit / value for value, limit in pairs if limit is not None]
    return [value, value * statistics.median(ratios) if ratios else None]


def build(folder: Path, max_seq_len: int, max_batch_size: int) -> Llama:
    return Llama.build(
        folder, max_seq_len=max_seq_len, max_batch_size=max_batch_size, device=CPU, dtype="bfloat16"
    )


def decode(folder: Path, longest: int) -> Iterator[Point]:
    """Decode of several sequences in one batch."""
    llama = build(folder, PROMPT + NEW, BATCHES[-1])
    random, vocab_size = torch.Generator().manual_seed(0), llama.model.params.vocab_size
    clock(generator(llama), random_prompts([PROMPT], vocab_size, random), NEW)  # warm
    # A step reads the weights once and multiplies them for every sequence: the slower of the two counts.
    work = prefill_flops(llama.model, 1, 1) / matrix_rate(CPU, torch.bfloat16)
    for batch in BATCHES:
        _, step, _ = clock(generator(llama), random_prompts([PROMPT] * batch, vocab_size, random), NEW)
        read = bytes_per_step(llama.model, batch, PROMPT + NEW // 2) / memory_bandwidth(CPU)
        yield "decode, tok/s", batch, batch / step, batch / max(read, batch * work)


def context(folder: Path, longest: int) -> Iterator[Point]:
    """One prompt; each length prefills only what the previous one did not have."""
    llama = build(folder, longest, 1)
    random, vocab_size = torch.Generator().manual_seed(0), llama.model.params.vocab_size
    (text,) = random_prompts([longest], vocab_size, random)
    clock(generator(llama), random_prompts([PROMPT], vocab_size, random), NEW)  # warm
    for length in [n for n in CONTEXTS if n <= longest]:
        _, step, _ = clock(generator(llama), [text[: length - NEW]], NEW)
        limit = bytes_per_step(llama.model, 1, length) / memory_bandwidth(CPU)
        yield "step, ms", length, 1e3 * step, 1e3 * limit


def prefill(folder: Path, longest: int) -> Iterator[Point]:
    """Time to first token of one prompt."""
    lengths = [n for n in LENGTHS if n <= longest]
    llama = build(folder, max(lengths[-1] + 2, PROMPT + NEW), 1)
    random, vocab_size = torch.Generator().manual_seed(0), llama.model.params.vocab_size
    clock(generator(llama), random_prompts([PROMPT], vocab_size, random), NEW)  # warm
    for length in lengths:
        runs = 3 if length < 512 else 1
        prompts = [random_prompts([length], vocab_size, random) for _ in range(runs)]
        first = statistics.median(clock(generator(llama), prompt, 2)[0] for prompt in prompts)
        rate = matrix_rate(CPU, torch.bfloat16)
        yield "prefill, tok/s", length, length / first, length * rate / prefill_flops(llama.model, 1, length)


def load(folder: Path, longest: int) -> Iterator[Point]:
    """Load time and memory of a model of this size, with a small cache."""
    start = time.perf_counter()
    llama = build(folder, 128, 1)
    seconds = time.perf_counter() - start
    clock(generator(llama), [[1, 2, 3]], 2)
    size = (folder / "consolidated.00.pth").stat().st_size / 1e9
    yield "load, s", size, seconds, None
    yield "memory, GB", size, peak_resident() / 1e9, size


KINDS = {"decode": decode, "context": context, "prefill": prefill, "load": load}


def models_of_all_sizes(native: Path, folder: Path) -> list[Path]:
    """Random models with another model's tokenizer, written if missing."""
    folders = [folder / str(i) for i in range(len(SIZES))]
    for path, shape in zip(folders, SIZES, strict=True):
        if not path.is_dir():
            common = {"multiple_of": 256, "vocab_size": read_params(native)["vocab_size"]}
            random_model(path, {**RANDOM_1B, **common, "ffn_dim_multiplier": None, **shape}, native)
    return folders


def draw(pyplot: Any, path: Path, curves: dict[str, dict[float, list[Any]]], about: str) -> None:
    """One small chart per curve, with the machine's limit as a dashed line."""
    rows = -(-len(curves) // 3)
    figure = pyplot.figure(figsize=(9, 0.4 + 2.5 * rows))
    for number, (curve, points) in enumerate(curves.items(), 1):
        axis = figure.add_subplot(rows, 3, number)
        against, dashed = CURVES[curve]
        places, values = list(points), [value for value, _ in points.values()]
        axis.plot(places, values, "o-", color="tab:blue", markersize=3)
        if dashed:
            limits = [limit for _, limit in points.values()]
            axis.plot(places, limits, "--", color="gray", linewidth=1, label=dashed)
            axis.legend(fontsize=6, frameon=False)
        if against in ("batch", "prompt length", "live context"):
            axis.set_xscale("log", base=2)
            axis.set_xticks(places[:: 2 if len(places) > 6 else 1])
            axis.xaxis.set_major_formatter(pyplot.FuncFormatter(lambda x, _: f"{x:.0f}"))
            axis.minorticks_off()
        else:
            axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.set_title(curve, fontsize=9)
        axis.set_xlabel(against, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(about, fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
