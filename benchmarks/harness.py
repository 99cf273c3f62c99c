"""What the benchmarks share: separate processes, clocks, the machine's name, tables and files."""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from engines import Generate, Prompts


def environment() -> dict[str, str]:
    """The environment of measured processes: the same number of threads in each."""
    # Not pinned by OMP_PROC_BIND: OpenVINO's threads would all inherit the first one's core.
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def in_process(*arguments: object) -> Any:
    """The output of this script, run again with these arguments added; None if it fails."""
    command = [sys.executable, *sys.argv, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment())
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def random_prompts(lengths: Iterable[int], vocab_size: int, generator: torch.Generator) -> Prompts:
    """Random token ids, none of them special."""
    return [
        torch.randint(100, vocab_size - 300, (length,), generator=generator).tolist() for length in lengths
    ]


def clock(generate: Generate, prompts: Prompts, new: int) -> tuple[float, float, float]:
    """Seconds until every prompt has its first token, per step after that (median), and in total."""
    ticks = [time.perf_counter()]
    generate(prompts, new, lambda: ticks.append(time.perf_counter()))
    steps = [after - before for before, after in pairwise(ticks[1:])]
    return ticks[1] - ticks[0], statistics.median(steps), ticks[-1] - ticks[0]


def weights(native: Path) -> str:
    """The name and size of a checkpoint."""
    name = native.resolve().name if native.is_symlink() else "random weights"
    return f"{name}, {(native / 'consolidated.00.pth').stat().st_size / 1e9:.2f} GB"


def machine() -> str:
    """The processor, the threads used, the version of PyTorch, and today's date."""
    name = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).is_file():
        names = [line.split(": ", 1)[1] for line in file.read_text().splitlines() if "model name\t" in line]
        name = next(iter(names), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}"


def three_digits(number: float) -> str:
    """As in 0.123, 12.3 and 12,300."""
    return f"{float(f'{number:.3g}'):,g}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, with numbers to three digits."""
    cells = [[three_digits(cell) if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells])


def save(path: Path, table: str, results: object, draw: Callable[[Any, Path], None]) -> None:
    """Print the table, and write table, results and chart to path.md, path.json and path.png."""
    print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.md").write_text(table, "utf-8")
    Path(f"{path}.json").write_text(json.dumps(results, indent=1), "utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no chart, because matplotlib is not installed", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    draw(pyplot, Path(f"{path}.png"))
