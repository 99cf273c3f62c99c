"""Compare engines on the same weights: python benchmarks/run.py FOLDER

Each measurement is a process of its own, and the engines take turns, round after round, so that all
see the same machine; the table has medians. The memory's bandwidth is probed before each of them. All
get the same prompts, of random tokens, and choose greedily. The weights are written to FOLDER first:
those of --native, or of a random model of Llama 3.2 1B's shape. Peers that are not installed are left
out. A chat through the example script, from its start to its end, stands below the table.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from engines import ENGINES
from harness import clock, environment, in_process, machine, markdown, random_prompts, save, weights
from models import prepare

from llama import backends
from llama.checkpoint import open_checkpoint
from llama.checkpoint.params import read_params
from llama.cli.bench import memory_bandwidth, peak_resident
from llama.loading import weight_bytes
from llama.model import ModelArgs, Transformer

ROOT = Path(__file__).parent.parent
MIXED = (16, 64, 256, 500)
LONG = 30.0  # seconds: a mixed batch that takes longer is run in the first round alone
COLUMNS = {
    "prefill": "prefill, tok/s",
    "first_token": "first token, ms",
    "decode": "decode, tok/s",
    "share": "of bandwidth, %",
    "decode_8": "decode of 8, tok/s",
    "mixed": "mixed batch, s",
    "load": "load, s",
    "warm_up": "warm-up, s",
    "memory": "memory, GB",
}
CHAT = ("--temperature", "0", "--max_gen_len", "32")
END_TO_END = {
    "example_chat_completion.py": [
        *("-m", "torch.distributed.run", "--nproc_per_node", "1"),
        *("example_chat_completion.py", "--ckpt_dir"),
    ],
    "python -m llama chat": ["-m", "llama", "chat"],
}
QUESTION = "What is the capital of France?\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the weights")
    parser.add_argument(
        "--native", type=Path, help="a native checkpoint in one file, instead of a random one"
    )
    parser.add_argument("--engines", nargs="*", help=f"some of: {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=16, help="tokens")
    parser.add_argument("--threads", type=int, help="by default PyTorch's choice")
    parser.add_argument("--settle", type=float, default=12, help="seconds of work before the timings")
    parser.add_argument("--save", type=Path, help="PATH.md, .json and .png; by default FOLDER/results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the process of one engine
    parser.add_argument("--without_mixed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure(options)))
        return
    names = []
    for name in options.engines or ENGINES:
        if name not in ENGINES:
            sys.exit(f"error: no engine {name!r}; there are {', '.join(ENGINES)}")
        package = (ENGINES[name][1] or "llama").split(".")[0]
        if importlib.util.find_spec(package) is None:
            print(f"{name}: left out, for {package} is not installed", file=sys.stderr)
        else:
            names.append(name)
    prepare(options.folder, options.native, [str(ENGINES[name][2].get("file", "")) for name in names])
    # Compilation begins with nothing in the first round; the others use what it left.
    shutil.rmtree(options.folder / "compiled", ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str((options.folder / "compiled").resolve())
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    chats: dict[str, list[float]] = {name: [] for name in END_TO_END}
    bandwidths = []
    for number in range(options.rounds):
        for name in [*results, *chats]:
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            found: Any
            if name in END_TO_END:
                if found := seconds_to_chat(END_TO_END[name], options.folder):
                    chats[name].append(found)
            else:
                bandwidths.append(memory_bandwidth(torch.device("cpu")) / 1e9)
                runs = results[name]
                flags = ["--without_mixed"] if runs and runs[0]["mixed"] > LONG else []
                if found := in_process("--measure", name, *flags):
                    runs.append(found)
            if not found:
                print(f"{name}: left out, for it failed", file=sys.stderr)
                (chats if name in chats else results).pop(name)
    bandwidth = statistics.median(bandwidths)
    medians = {}
    for name, runs in results.items():
        row = {key: statistics.median(run[key] for run in runs if key in run) for key in runs[0]}
        row["warm_up"] = runs[0]["warm_up"]
        read = bytes_per_token(options.folder, **ENGINES[name][2])
        medians[name] = row | {"share": 100 * row["decode"] * read / bandwidth / 1e9}
    about = (
        f"{weights(options.folder / 'native')}; {machine()}; medians of {options.rounds} rounds; prompts of "
        f"{options.prompt} tokens, {options.new} new; mixed batch: {', '.join(map(str, MIXED))}; memory read "
        f"at {bandwidth:.0f} GB/s ({min(bandwidths):.0f} to {max(bandwidths):.0f})"
    )
    lines = [
        markdown(
            ["engine", *COLUMNS.values()],
            [[name, *(float(row[key]) for key in COLUMNS)] for name, row in medians.items()],
        ),
        "",
        *(
            f"`{name}`, from start to end, load included: {statistics.median(seconds):.1f} s.  "
            for name, seconds in chats.items()
        ),
        "",
        f"{about}. The share of bandwidth counts the weights that a token reads. Warm-up is the first "
        "round's, compilation included. Memory is the peak of what was resident, with the pages of mapped "
        "files, which could be dropped.",
        "",
    ]
    save(
        options.save or options.folder / "results",
        "\n".join(lines),
        {"about": about, "bandwidths": bandwidths, "engines": results, "end to end": chats},
        lambda pyplot, path: draw(pyplot, path, medians, about),
    )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One engine, in this process: seconds, tokens per second, and GB of memory at most."""
    open_engine, module, arguments = ENGINES[options.measure]
    if module:
        importlib.import_module(module)  # loading is of weights, not of code
    prompt, new = options.prompt, options.new
    start = time.perf_counter()
    generate = open_engine(options.folder, max(prompt, *MIXED) + new, 8, **arguments)
    loaded = time.perf_counter()
    vocab_size = read_params(options.folder / "native")["vocab_size"]
    # The same for every engine, and new ones for every run: a prompt that was read before costs nothing.
    generator = torch.Generator().manual_seed(0)

    def timed(lengths: list[int], runs: int, new: int = new) -> tuple[float, float, float]:
        """Medians of what `clock` returns."""
        prompts = [random_prompts(lengths, vocab_size, generator) for _ in range(runs)]
        columns = zip(*(clock(generate, p, new) for p in prompts), strict=True)
        first, step, total = map(statistics.median, columns)
        return first, step, total

    # Every number of rows that comes below, since torch.compile may look at each anew.
    for lengths in ([prompt], [16] * 8, [16, 17, 18, 19]):
        timed(lengths, 1, new=3)
    warm = time.perf_counter()
    # Memory that is new to a virtual machine is slow for its first seconds.
    while time.perf_counter() - loaded < options.settle:
        timed([prompt], 1)
    first, step, _ = timed([prompt], 3)
    found = {
        "load": loaded - start,
        "warm_up": warm - loaded,
        "first_token": first * 1e3,
        "prefill": prompt / first,
        "decode": 1 / step,
        "decode_8": 8 / timed([prompt] * 8, 1)[1],
    }
    if not options.without_mixed:
        found["mixed"] = timed(list(MIXED), 1)[2]
    return found | {"memory": peak_resident() / 1e9}


def bytes_per_token(folder: Path, quantize: str | None = None, file: str | None = None, **_: object) -> int:
    """Bytes of weights that one token reads: all but the embeddings, where the output has its own."""
    if file:
        import gguf

        sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(folder / f"{file}.gguf").tensors}
        return sum(sizes.values()) - ("output.weight" in sizes and sizes["token_embd.weight"])
    with torch.device("meta"):
        model = Transformer(ModelArgs(**read_params(folder / "native")))
    source = open_checkpoint(folder / "native").weights
    plan = backends.plan(model, torch.device("cpu"), torch.bfloat16, quantize)
    return weight_bytes(model, source, plan, torch.bfloat16, quantize, embeddings=False)


def seconds_to_chat(command: list[str], folder: Path) -> float | None:
    """From the start of a program that loads the model and answers to its end; None where it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command, str((folder / "native").resolve()), *CHAT],
        input=QUESTION,  # the example has its own
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    return None if done.returncode else time.perf_counter() - start


def draw(pyplot: Any, path: Path, medians: dict[str, dict[str, float]], about: str) -> None:
    """Bars: this runtime's in one colour, its peers' in another."""
    charts = ("prefill", "decode", "decode_8", "mixed")
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 2 + 0.45 * len(medians)), sharey=True)
    colours = ["tab:blue" if name.startswith("this runtime") else "silver" for name in medians]
    for axis, key in zip(axes.flat, charts, strict=True):
        bars = axis.barh(list(medians), [row[key] for row in medians.values()], color=colours)
        axis.bar_label(bars, fmt=" %.3g", fontsize=8)
        axis.set_title(COLUMNS[key] + (" (less is better)" if key == "mixed" else ""), fontsize=10)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    figure.supxlabel(about, fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
