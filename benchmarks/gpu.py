"""Everything about a GPU in one command: python benchmarks/gpu.py

Runs the tests marked `cuda`, then decode and prefill of random models created on the device, with the
fraction reached of the device's own bandwidth and matrix rate. Needs no network or files, and stops on time.
Prints tables, and writes them and their numbers to FILE.md and FILE.json.

A decode step reads every weight once, and the live cache; "engine" is the same including all overhead. Peers,
at batch 1 and the shortest context: the same model in one plain `torch.compile`, as in gpt-fast, and
`transformers`, if installed.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import markdown
from models import RANDOM_1B
from torch import Tensor

from llama import backends
from llama.backends import Plan
from llama.backends.torchao import check_float8
from llama.checkpoint.source import whole_parts
from llama.cli.bench import bytes_per_step, generate, matrix_rate, memory_bandwidth, prefill_flops
from llama.engine import Engine
from llama.engine.static import StaticRunner, compile_blocks
from llama.errors import LlamaError
from llama.loading import load_weights
from llama.model import ModelArgs, Transformer
from llama.parallel import Span

ROOT = Path(__file__).parent.parent
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**RANDOM_1B, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512},
    "1B": RANDOM_1B,
    "8B": {
        **RANDOM_1B,
        **{"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
    },
}
MOST_READ = 2**16  # maximum prompt tokens per measurement
NEW = 16  # tokens that the engine generates per measurement
STEPS = 20  # the median of these counts


@dataclass(frozen=True)
class Row:
    """Tokens per second, and fractions of the device's limits, at one batch and context."""

    model: str
    weights: str
    batch: int
    context: int
    decode: float
    bandwidth_share: float
    engine: float | None = None
    prefill: float | None = None
    rate_share: float | None = None


class RandomSource:
    """A `TensorSource` of random weights, created where they are needed, the same at every read."""

    dtype = torch.bfloat16

    def __init__(self, args: ModelArgs, device: torch.device) -> None:
        self.shapes = {name: part.shape for name, part in whole_parts(args).items()}
        self.device = device

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        seeded = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        weight.normal_(std=0.02, generator=seeded)
        return weight if span is None else weight.narrow(dim, span[0], span[1] - span[0])

    def release(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--models", nargs="+", default=["1B", "8B"], choices=SHAPES)
    parser.add_argument("--weights", nargs="+", default=["bf16", "int8", "int4", "fp8"])
    parser.add_argument("--batches", nargs="+", default=[1, 8, 32], type=int)
    parser.add_argument("--contexts", nargs="+", default=[128, 2048, 8192], type=int)
    parser.add_argument("--minutes", default=9.0, type=float, help="after these, nothing new is started")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results" / "gpu", type=Path)
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --device cpu --models tiny tries this script out")
    end = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "bandwidth": memory_bandwidth(options.device),
        "matrix_rate": matrix_rate(options.device, torch.bfloat16),
        "tests": None if options.no_tests else run_tests(60 * options.minutes / 3),
        "rows": [],
        "peers": {},
        "left_out": [],
    }
    for name in options.models:
        for weights in [*options.weights, "peers"]:
            if time.monotonic() > end:
                results["left_out"].append(f"{name} {weights}: out of time")
                continue
            try:
                if weights == "peers":
                    measure_peers(name, options, results)
                else:
                    measure(name, weights, options, end, results)
            except (LlamaError, RuntimeError) as error:  # keep the other measurements
                results["left_out"].append(f"{name} {weights}: {str(error).splitlines()[0]}")
            torch.compiler.reset()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
            write(options.out, results)
    write(options.out, results)
    print(Path(f"{options.out}.md").read_text("utf-8"))


def run_tests(seconds: float) -> str:
    """The last line of pytest's output for the tests marked `cuda`, and the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done in {seconds:.0f} s"
    lines = [*filter(None, (done.stdout + done.stderr).splitlines())] or ["nothing"]
    return "; ".join([lines[-1], *(line for line in lines[:-1] if line.startswith(("FAILED", "ERROR")))])


def build(
    name: str, options: argparse.Namespace, scheme: str | None = None, plan: Plan | None = None
) -> Transformer:
    """A random model. plan: by default the device's own."""
    longest, most = max(options.contexts), max(options.batches)
    args = ModelArgs(**SHAPES[name], max_seq_len=longest, max_batch_size=most)
    with torch.device("meta"):
        model = Transformer(args)
    plan = plan or backends.plan(model, options.device, torch.bfloat16, scheme)
    load_weights(model, RandomSource(args, options.device), plan, options.device, torch.bfloat16, scheme)
    model.allocate_cache()
    return model


def measure_peers(name: str, options: argparse.Namespace, results: dict[str, Any]) -> None:
    context = min(options.contexts)
    model = build(name, options, plan=Plan(joins=True))
    runner = StaticRunner(model)
    runner.flex, runner.graphs = False, None
    whole = torch.compile(runner.run, fullgraph=True, mode="reduce-overhead")
    step = step_of(lambda t, p: whole(t, p, context), options.device, 1, context)
    results["peers"][f"{name}, one torch.compile"] = 1 / step
    if importlib.util.find_spec("transformers"):
        results["peers"][f"{name}, transformers"] = 1 / transformers_step(model, context)


def measure(
    name: str, weights: str, options: argparse.Namespace, end: float, results: dict[str, Any]
) -> None:
    """Add rows to the results until the time is up."""
    scheme = None if weights == "bf16" else weights
    if scheme == "fp8":
        check_float8(options.device)
    model = build(name, options, scheme)
    if options.device.type == "cuda":
        compile_blocks(model)
    engine = Engine(model, prefill_chunk=2048, static=True)
    for batch in options.batches:
        for context in options.contexts:
            if time.monotonic() > end:
                results["left_out"].append(f"{name} {weights}, batch {batch}, context {context}: no time")
                continue
            assert engine.static
            logits, reach = engine.static.logits, context - 1
            step = step_of(lambda t, p: logits(t, p, reach), options.device, batch, context)  # noqa: B023
            share = bytes_per_step(model, batch, context) / step / results["bandwidth"]
            row = Row(name, weights, batch, context, batch / step, share)
            if batch * context <= MOST_READ:
                row = with_engine(row, engine, results["matrix_rate"])
            results["rows"].append(asdict(row))
    engine.close()


def with_engine(row: Row, engine: Engine, rate: float) -> Row:
    """The row with the speed of a whole engine that reads prompts and generates a few tokens."""
    pair: Any = SimpleNamespace(model=engine.model, engine=engine)
    length = row.context - NEW
    timings = [generate(pair, [length] * row.batch, NEW) for _ in range(3)][1:]
    first = min(timing.first_token for timing in timings)
    return Row(
        **{
            **asdict(row),
            "engine": row.batch / min(timing.step for timing in timings),
            "prefill": row.batch * length / first,
            "rate_share": prefill_flops(engine.model, row.batch, length) / first / rate,
        }
    )


@torch.inference_mode()
def step_of(
    step: Callable[[Tensor, Tensor], Tensor], device: torch.device, batch: int, context: int
) -> float:
    """Seconds for one token of each of `batch` sequences, at the last position of a context."""
    tokens = torch.zeros(batch, dtype=torch.int64, device=device)
    positions = torch.full_like(tokens, context - 1)
    seconds = []
    for i in range(3 + STEPS):
        start = time.perf_counter()
        step(tokens, positions)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 3:  # after compiling and capturing
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def transformers_step(model: Transformer, context: int) -> float:
    """Seconds for a step of `transformers` with a model of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args = model.params
    config = LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        vocab_size=args.vocab_size,
        eos_token_id=None,
    )
    with torch.device(model.device):
        theirs: Any = LlamaForCausalLM(config).bfloat16().eval()
        prompt = torch.randint(args.vocab_size, (1, context))
    seconds = []
    for new in (1, 1, 1 + NEW):
        start = time.perf_counter()
        theirs.generate(prompt, min_new_tokens=new, max_new_tokens=new, do_sample=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    return (seconds[2] - seconds[1]) / NEW


def write(path: Path, results: dict[str, Any]) -> None:
    head = ["model", "weights", "batch", "context", "decode, tok/s", "of bandwidth, %"]
    head += ["engine, tok/s", "prefill, tok/s", "of matrix rate, %"]
    rows = [[*row.values()] for row in results["rows"]]
    for row in rows:
        row[5], row[8] = 100 * row[5], None if row[8] is None else 100 * row[8]
    text = [
        f"{results['device']}, torch {results['torch']}: copies {results['bandwidth'] / 1e9:.0f} GB/s, "
        f"multiplies bf16 at {results['matrix_rate'] / 1e12:.3g} TFLOP/s. Tests: {results['tests']}",
        markdown(head, [["" if cell is None else cell for cell in row] for row in rows]),
        *(f"{name}, batch 1: {speed:.3g} tok/s" for name, speed in results["peers"].items()),
        *(f"skipped: {reason}" for reason in results["left_out"]),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.md").write_text("\n\n".join(text) + "\n", "utf-8")
    Path(f"{path}.json").write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main()
