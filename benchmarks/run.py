"""Compare engines on the same weights: python benchmarks/run.py FOLDER

Each measurement is a separate process, and the engines alternate over several rounds, so that all see the
same machine; the tables show medians. Each engine's process probes the memory too. All engines get
the same prompts of random tokens and decode greedily. The weights are written to FOLDER first: those of
--native, or of a random model of Llama 3.2 1B's shape. Peers that are not installed, or have no weights, are
skipped. A second table has this runtime's ratios to each peer with the same bits, in the same round, next to
the goals. Below it is the time of a whole chat.
"""

import argparse
import importlib
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
from harness import (
    clock,
    environment,
    in_process,
    machine,
    markdown,
    random_prompts,
    save,
    three_digits,
    weights,
)
from models import prepare

from llama import backends
from llama.checkpoint import open_checkpoint
from llama.checkpoint.params import read_params
from llama.cli.bench import memory_bandwidth, peak_resident
from llama.loading import weight_bytes
from llama.model import ModelArgs, Transformer

ROOT = Path(__file__).parent.parent
COLUMNS = {
    "prefill": "prefill of 128, tok/s",
    "prefill_512": "of 512",
    "decode": "decode, tok/s",
    "share": "of bandwidth, %",
    "decode_1024": "at a context of 1024",
    "decode_8": "decode of 8, tok/s",
    "load": "load, s",
    "warm_up": "warm-up, s",
    "memory": "memory, GB",
}
PREFILL = {"prefill": 2.0, "prefill_512": 2.0}
# How many times as fast as a peer this runtime should be, in models of 1B and, below, in smaller ones.
GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("bf16", "llama.cpp, bf16"): {"prefill": 1.5, "prefill_512": 1.5, "decode": 1.05, "decode_8": 1.3},
    ("int8", "llama.cpp, Q8_0"): PREFILL | {"decode": 1.3, "decode_8": 1.8},
    ("int4", "llama.cpp, Q4_0"): PREFILL | {"decode": 1.15, "decode_8": 2.2},
    ("int4", "llama.cpp, Q4_1"): {},
    ("bf16", "OpenVINO GenAI, bf16"): {"prefill": 1.1, "prefill_512": 1.1},
    ("int8", "OpenVINO GenAI, int8"): {"prefill": 1.1, "prefill_512": 1.1},
    ("int4", "OpenVINO GenAI, int4"): {"prefill": 1.1, "prefill_512": 1.1},
    ("int4", "ONNX Runtime GenAI, int4"): {},
    ("bf16", "Meta's llama-models, bf16"): {"decode": 3},
    ("bf16", "transformers, bf16"): {},
}
SMALL = 1e9  # bytes in bf16
GOALS_WHEN_SMALL: dict[tuple[str, str], dict[str, float]] = {
    ("bf16", "llama.cpp, bf16"): {"decode": 1.2, "decode_8": 2},
    ("int8", "llama.cpp, Q8_0"): {"decode": 1.4, "decode_8": 2},
    ("int4", "llama.cpp, Q4_0"): {"decode": 1.3, "decode_8": 2},
    ("int4", "llama.cpp, Q4_1"): {"decode": 2},
}
EXPORTED = ("openvino_genai", "onnxruntime_genai")  # they read folders that this script does not write
RATIOS = ("prefill", "prefill_512", "decode", "decode_1024", "decode_8")
CHAT = ("--temperature", "0", "--max_gen_len", "32")
END_TO_END = {
    "example_chat_completion.py": [
        *("-m", "torch.distributed.run", "--nproc_per_node", "1"),
        *("example_chat_completion.py", "--ckpt_dir"),
    ],
    "python -m llama chat": ["-m", "llama", "chat"],
}
QUESTION = "What is the capital of France?\n"
Runs = dict[str, list[dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the weights")
    parser.add_argument(
        "--native", type=Path, help="a native checkpoint in one file, instead of a random one"
    )
    choices = [*ENGINES, *END_TO_END]
    parser.add_argument("--engines", nargs="*", help=f"some of: {'; '.join(choices)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="start no round that would end later")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--long", type=int, default=1024, help="tokens of the long context")
    parser.add_argument("--new", type=int, default=16, help="tokens")
    parser.add_argument("--threads", type=int, help="by default PyTorch's choice")
    parser.add_argument("--settle", type=float, default=3, help="seconds of work before the timings")
    parser.add_argument("--save", type=Path, help="PATH.md, .json and .png; by default FOLDER/results")
    parser.add_argument("--prepare", action="store_true", help="only write the weights")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # run as the process for one engine
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure(options)))
        return
    if unknown := set(options.engines or []) - set(choices):
        sys.exit(f"error: unknown engine {unknown.pop()!r}; use one of: {'; '.join(choices)}")
    names = available(options.folder, options.engines or choices)
    engines = [ENGINES[name] for name in names if name in ENGINES]
    prepare(
        options.folder,
        options.native,
        [file for _, module, arguments in engines if module == "llama_cpp" for file in arguments.values()],
        [arguments["quantize"] for _, _, arguments in engines if "quantize" in arguments],
        hf=any(name.startswith("transformers") for name in names),
    )
    if options.prepare:
        return
    # The first round compiles from scratch; the others reuse its results.
    shutil.rmtree(options.folder / "compiled", ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str((options.folder / "compiled").resolve())
    report(options, take_turns(options, names))


def available(folder: Path, names: list[str]) -> list[str]:
    """The engines that are installed here and have weights, or can get them."""
    found = []
    for name in names:
        _, module, arguments = ENGINES.get(name, (None, None, {}))
        package = (module or "llama").split(".")[0]
        if importlib.util.find_spec(package) is None:
            print(f"{name}: skipped, because {package} is not installed", file=sys.stderr)
        elif package in EXPORTED and not (folder / arguments["file"]).is_dir():
            print(f"{name}: skipped, because there is no {folder / arguments['file']}", file=sys.stderr)
        else:
            found.append(name)
    return found


def take_turns(options: argparse.Namespace, names: list[str]) -> Runs:
    """The results of each engine or chat in each round."""
    results: Runs = {name: [] for name in names}
    start, number, longest = time.perf_counter(), 0, 0.0
    while number < options.rounds and time.perf_counter() - start + longest < 60 * options.minutes:
        number, begun = number + 1, time.perf_counter()
        for name in list(results):
            print(f"round {number} of {options.rounds}: {name}", file=sys.stderr)
            chat = END_TO_END.get(name)
            found = seconds_to_chat(chat, options.folder) if chat else in_process("--measure", name)
            if found:
                results[name].append(found)
            else:
                print(f"{name}: skipped, because it failed", file=sys.stderr)
                del results[name]
        longest = max(longest, time.perf_counter() - begun)
    return results


def report(options: argparse.Namespace, results: Runs) -> None:
    medians, chats, bandwidths = {}, [], []
    for name, runs in results.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if name in END_TO_END:
            chats.append(f"`{name}`, from start to end, load included: {row['seconds']:.1f} s.  ")
            continue
        row["warm_up"] = runs[0]["warm_up"]
        read = bytes_per_token(options.folder, **ENGINES[name][2]) / 1e9
        bandwidths += [run["bandwidth"] for run in runs]
        share = statistics.median(run["decode"] * read / run["bandwidth"] for run in runs)
        medians[name] = row | {"share": 100 * share}
    rounds, bandwidth = max(map(len, results.values())), statistics.median(bandwidths or [0])
    small = (options.folder / "native" / "consolidated.00.pth").stat().st_size < SMALL
    about = (
        f"{weights(options.folder / 'native')}; {machine()}; medians of {rounds} rounds; prompts of "
        f"{options.prompt} tokens, {options.new} new; memory read at {bandwidth:.0f} GB/s "
        f"({min(bandwidths, default=0):.0f} to {max(bandwidths, default=0):.0f})"
    )
    lines = [
        markdown(
            ["engine", *COLUMNS.values()],
            [[name, *(float(row[key]) or "" for key in COLUMNS)] for name, row in medians.items()],
        ),
        *(
            "",
            "This runtime's speed as a multiple of each peer's, in the same round; in brackets: the goal.",
            "",
        ),
        markdown(
            ["against", *(COLUMNS[key].removesuffix(", tok/s") for key in RATIOS)], ratios(results, small)
        ),
        *("", *chats, ""),
        f"{about}. The share of bandwidth counts the weights that a token reads. Warm-up is the first "
        "round's, compilation included. Memory is the peak of what was resident, with the pages of mapped "
        "files, which could be dropped.",
        "",
    ]
    save(
        options.save or options.folder / "results",
        "\n".join(lines),
        {"about": about, "engines": results},
        lambda pyplot, path: draw(pyplot, path, medians, about),
    )


def ratios(results: Runs, small: bool) -> list[list[str]]:
    """Rows of the second table: medians over the rounds."""
    rows = []
    for (ours, peer), goals in GOALS.items():
        if small:
            goals = goals | GOALS_WHEN_SMALL.get((ours, peer), {})
        mine, theirs = results.get(f"this runtime, {ours}"), results.get(peer)
        if not mine or not theirs:
            continue
        cells = [f"{peer}" + ("" if peer.endswith(ours) else f": {ours}")]
        for key in RATIOS:
            ratio = statistics.median(a[key] / b[key] for a, b in zip(mine, theirs, strict=False))
            cells.append(f"{ratio:.2f}" + (f" ({goals[key]:g})" if key in goals else ""))
        rows.append(cells)
    return rows


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One engine, in this process: seconds, tokens per second, and peak memory in GB."""
    open_engine, module, arguments = ENGINES[options.measure]
    if module:
        importlib.import_module(module)  # loading is of weights, not of code
    prompt, new, long = options.prompt, options.new, options.long
    start = time.perf_counter()
    generate = open_engine(options.folder, max(prompt + new, long), 8, **arguments)
    loaded = time.perf_counter()
    vocab_size = read_params(options.folder / "native")["vocab_size"]
    # The same for every engine, but new for every run, because a prompt read before would cost nothing.
    generator = torch.Generator().manual_seed(0)

    def timed(lengths: list[int], runs: int, new: int = new) -> tuple[float, float]:
        """Median seconds to the first token and per step."""
        prompts = [random_prompts(lengths, vocab_size, generator) for _ in range(runs)]
        first, step, _ = zip(*(clock(generate, p, new) for p in prompts), strict=True)
        return statistics.median(first), statistics.median(step)

    # Every number of rows used below, because torch.compile may recompile for each.
    for lengths in ([prompt], [16] * 8):
        timed(lengths, 1, new=3)
    warm = time.perf_counter()
    # On a virtual machine, newly allocated memory is slow for the first seconds.
    while time.perf_counter() - loaded < options.settle:
        timed([prompt], 1)
    half = long // 2
    prefill_512 = half / timed([half], 1, new=3)[0]
    decode_1024 = 1 / timed([long - new], 1)[1]
    decode_8 = 8 / timed([prompt] * 8, 1)[1]
    memory = peak_resident() / 1e9  # before the probe, which needs more
    bandwidth = memory_bandwidth(torch.device("cpu")) / 1e9
    first, step = timed([prompt], 3)
    return {
        "load": loaded - start,
        "warm_up": warm - loaded,
        "first_token": first * 1e3,
        "prefill": prompt / first,
        "prefill_512": prefill_512,
        "decode": 1 / step,
        "decode_1024": decode_1024,
        "decode_8": decode_8,
        "memory": memory,
        "bandwidth": bandwidth,
    }


def bytes_per_token(folder: Path, quantize: str | None = None, file: str | None = None, **_: object) -> int:
    """Bytes of weights that one token reads: all except the embeddings, unless they are the output too.

    0, left out of the table, for a format whose sizes are unknown here.
    """
    if file:
        if (path := folder / file / "config.json").is_file():
            tied = json.loads(path.read_text("utf-8")).get("tie_word_embeddings")
            path = path.with_name("openvino_model.bin")  # with one copy of what is tied
            return path.stat().st_size if tied and path.is_file() else 0
        if not (path := folder / f"{file}.gguf").is_file():
            return 0
        import gguf

        sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors}
        return sum(sizes.values()) - ("output.weight" in sizes and sizes["token_embd.weight"])
    with torch.device("meta"):
        model = Transformer(ModelArgs(**read_params(folder / "native")))
    source = open_checkpoint(folder / "native").weights
    plan = backends.plan(model, torch.device("cpu"), torch.bfloat16, quantize)
    return weight_bytes(model, source, plan, torch.bfloat16, quantize, embeddings=False)


def seconds_to_chat(command: list[str], folder: Path) -> dict[str, float] | None:
    """Seconds for a whole program that loads the model and answers; None if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command, str((folder / "native").resolve()), *CHAT],
        input=QUESTION,  # the example has its own questions
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    return None if done.returncode else {"seconds": time.perf_counter() - start}


def draw(pyplot: Any, path: Path, medians: dict[str, dict[str, float]], about: str) -> None:
    """Bar charts: this runtime in one colour, its peers in another."""
    charts = ("prefill", "prefill_512", "decode", "decode_8")
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 2 + 0.45 * len(medians)), sharey=True)
    colours = ["tab:blue" if name.startswith("this runtime") else "silver" for name in medians]
    for axis, key in zip(axes.flat, charts, strict=True):
        bars = axis.barh(list(medians), [row[key] for row in medians.values()], color=colours)
        axis.bar_label(bars, fmt=lambda number: f" {three_digits(number)}", fontsize=8)
        axis.set_title("prefill of 512, tok/s" if key == "prefill_512" else COLUMNS[key], fontsize=10)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    figure.supxlabel(about, fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
