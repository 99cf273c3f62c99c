"""Compare engines on the same weights: python benchmarks/run.py FOLDER

Each measurement is a process of its own, and the engines take turns, round after round, so that all
see the same machine; the table has medians. The memory's bandwidth is probed in every round. The
weights are written to FOLDER first: those of --native, or of a random model of Llama 3.2 1B's shape.
Peers that are not installed are left out.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from engines import ENGINES
from models import prepare

from llama.bench import memory_bandwidth
from llama.checkpoint import read_params

MIXED = (16, 64, 256, 500)
COLUMNS = {
    "prefill": "prefill, tok/s",
    "first_token": "first token, ms",
    "decode": "decode, tok/s",
    "decode_8": "decode of 8, tok/s",
    "mixed": "mixed batch, s",
    "load": "load, s",
    "memory": "memory, GB",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the weights, and of the results")
    parser.add_argument(
        "--native", type=Path, help="a native checkpoint in one file, instead of a random one"
    )
    parser.add_argument("--engines", nargs="*", help=f"some of: {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens")
    parser.add_argument("--threads", type=int, help="by default PyTorch's choice")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the process of one engine
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.prompt, options.new)))
        return
    names = []
    for name in options.engines or ENGINES:
        if name not in ENGINES:
            sys.exit(f"error: no engine {name!r}; there are {', '.join(ENGINES)}")
        package = ENGINES[name][1]
        if package and importlib.util.find_spec(package) is None:
            print(f"{name}: left out, for {package} is not installed", file=sys.stderr)
        else:
            names.append(name)
    prepare(options.folder, options.native, [str(ENGINES[name][2].get("file", "")) for name in names])
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    bandwidths = []
    for number in range(options.rounds):
        bandwidths.append(memory_bandwidth(torch.device("cpu")) / 1e9)
        for name in list(results):
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--measure", name],
                stdout=subprocess.PIPE,
                text=True,
                env={"OMP_PROC_BIND": "close", **os.environ},
            )
            if done.returncode:
                print(f"{name}: left out, for it failed", file=sys.stderr)
                del results[name]
            else:
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in COLUMNS}
        for name, runs in results.items()
    }
    about = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {date.today()}; memory read at {min(bandwidths):.0f} to "
        f"{max(bandwidths):.0f} GB/s; medians of {options.rounds} rounds; prompts of {options.prompt} "
        f"tokens, {options.new} new; mixed batch: {', '.join(map(str, MIXED))}"
    )
    table = markdown(medians, about)
    print(table)
    (options.folder / "results.md").write_text(table, "utf-8")
    (options.folder / "results.json").write_text(json.dumps(results, indent=1), "utf-8")
    if importlib.util.find_spec("matplotlib"):
        draw(medians, about, options.folder / "results.png")
    else:
        print("no charts, for matplotlib is not installed", file=sys.stderr)


def measure(name: str, folder: Path, prompt: int, new: int) -> dict[str, float]:
    """One engine, in this process: seconds, tokens per second, and bytes of memory at most."""
    start = time.perf_counter()
    open_engine, _, arguments = ENGINES[name]
    generate = open_engine(folder, max(prompt, *MIXED) + new, 8, **arguments)
    found: dict[str, float] = {"load": time.perf_counter() - start}
    vocab_size = read_params(folder / "native")["vocab_size"]

    def timed(lengths: list[int], repeats: int) -> tuple[float, float, float]:
        """Seconds to the first tokens, of a step after them, and of all: medians."""
        firsts, steps, totals = [], [], []
        for _ in range(repeats):
            prompts = [torch.randint(100, vocab_size - 300, (length,)).tolist() for length in lengths]
            ticks = [time.perf_counter()]
            generate(prompts, new, lambda ticks=ticks: ticks.append(time.perf_counter()))
            firsts.append(ticks[1] - ticks[0])
            steps += [after - before for before, after in pairwise(ticks[1:])]
            totals.append(ticks[-1] - ticks[0])
        return statistics.median(firsts), statistics.median(steps), statistics.median(totals)

    timed([prompt], 1)  # warm
    first, step, _ = timed([prompt], 3)
    found |= {"first_token": first * 1e3, "prefill": prompt / first, "decode": 1 / step}
    found["decode_8"] = 8 / timed([prompt] * 8, 1)[1]
    found["mixed"] = timed(list(MIXED), 1)[2]
    unit = 1 if sys.platform == "darwin" else 1024
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return found


def markdown(medians: dict[str, dict[str, float]], about: str) -> str:
    lines = ["| engine | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in medians.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:.3g}" for key in COLUMNS) + " |")
    return "\n".join([*lines, "", about, ""])


def draw(medians: dict[str, dict[str, float]], about: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    charts = ("prefill", "decode", "decode_8", "mixed")
    figure, axes = pyplot.subplots(1, len(charts), figsize=(16, 1.5 + 0.4 * len(medians)), sharey=True)
    axis: Any
    for axis, key in zip(axes, charts, strict=True):
        bars = axis.barh(list(medians), [row[key] for row in medians.values()])
        axis.bar_label(bars, fmt="%.3g")
        axis.set_title(COLUMNS[key])
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    figure.supxlabel(about, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
