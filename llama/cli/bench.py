"""How fast a model runs here, compared with what this machine can do."""

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any

import torch

from llama.cli.options import BuildOptions
from llama.device import gigabytes, resident_bytes
from llama.errors import ArgumentError
from llama.generation import Llama
from llama.model import Transformer
from llama.sampling import SamplingParams

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def bench(
    ckpt_dir: str,
    *,
    batch: int = 1,
    prompt: int = 128,
    new: int = 32,
    runs: int = 5,
    profile: str | None = None,
    json: bool = False,
    build: BuildOptions = BuildOptions(max_seq_len=160),
) -> None:
    """Print the speed of prefill and decode, memory, and the fraction reached of this machine's limits.

    Args:
        ckpt_dir: folder of a checkpoint, a GGUF file, a URL, or a Hugging Face repository
        batch: sequences at the same time
        prompt: random tokens per prompt
        new: tokens generated per prompt
        runs: number of measured runs, after one to warm up; the output shows their medians
        profile: file for a trace of one more run, to open in https://ui.perfetto.dev
        json: print one JSON object, in seconds, tokens per second and bytes
    """
    if min(batch, prompt, runs) < 1 or new < 3:
        raise ArgumentError("batch, prompt and runs must be at least 1, and new at least 3")
    if profile is not None and not Path(profile).absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {profile}: no folder {Path(profile).parent}")
    needed = replace(
        build,
        max_seq_len=max(build.max_seq_len, prompt + new),
        max_batch_size=max(build.max_batch_size, batch),
    )
    start = time.perf_counter()
    with needed.build(ckpt_dir) as llama:
        loaded = time.perf_counter() - start
        figures = measure(llama, loaded, batch, prompt, new, runs)
        if profile is not None:
            with torch.profiler.profile() as profiler:
                generate(llama, [prompt] * batch, new)
            profiler.export_chrome_trace(profile)
    print(dumps(asdict(figures)) if json else figures.as_text())
    if profile is not None:
        print(f"Wrote {profile}", file=sys.stderr)


@dataclass(frozen=True)
class Figures:
    """What `bench` measures: seconds, tokens and operations per second, bytes."""

    batch: int
    prompt: int
    new: int
    runs: int
    load_seconds: float
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory: int
    kv_cache: int
    bytes_per_second: float  # read by decode
    bandwidth: float  # bytes per second that this machine can read
    flops: float  # of matrix products, per second of prefill
    matrix_rate: float  # floating point operations per second that this machine can do

    def as_text(self) -> str:
        read, work = self.bytes_per_second, self.flops
        lines = [
            f"batch {self.batch}, prompts of {self.prompt} tokens, {self.new} new; "
            f"medians of {self.runs} runs",
            f"load                 {self.load_seconds:10.2f} s",
            f"time to first token  {self.first_token_seconds * 1e3:10.1f} ms",
            f"prefill              {self.prefill_tokens_per_second:10.1f} tokens/s",
            f"decode               {self.decode_tokens_per_second:10.1f} tokens/s",
            f"memory               {gigabytes(self.peak_memory):>10} at most, "
            f"{gigabytes(self.kv_cache)} of it KV cache",
            f"bandwidth, decode    {read / 1e9:10.1f} GB/s, "
            f"{read / self.bandwidth:.0%} of {self.bandwidth / 1e9:.1f}",
            f"matrices, prefill    {work / 1e12:10.3f} TFLOP/s, "
            f"{work / self.matrix_rate:.0%} of {self.matrix_rate / 1e12:.3f}",
        ]
        return "\n".join(lines)


def measure(llama: Llama, loaded: float, batch: int, prompt: int, new: int, runs: int) -> Figures:
    """The medians of some runs, after one to warm up. loaded: seconds that loading took."""
    lengths = [prompt] * batch
    generate(llama, lengths, new)
    peak = peak_memory()  # before the probes, which need more
    # The limits are probed between the runs, so that all see the same machine.
    timings, bandwidths, rates = [], [], []
    for _ in range(runs):
        timings.append(generate(llama, lengths, new))
        bandwidths.append(memory_bandwidth(llama.model.device))
        rates.append(matrix_rate(llama.model.device, llama.model.dtype))
    first = statistics.median(timing.first_token for timing in timings)
    step = statistics.median(timing.step for timing in timings)
    return Figures(
        batch,
        prompt,
        new,
        runs,
        load_seconds=loaded,
        first_token_seconds=first,
        prefill_tokens_per_second=batch * prompt / first,
        decode_tokens_per_second=batch / step,
        peak_memory=peak,
        kv_cache=llama.model.cache.data.nbytes,
        bytes_per_second=bytes_per_step(llama.model, batch, prompt + new // 2) / step,
        bandwidth=statistics.median(bandwidths),
        flops=prefill_flops(llama.model, batch, prompt) / first,
        matrix_rate=statistics.median(rates),
    )


@dataclass(frozen=True)
class Timing:
    """Seconds until every prompt has its first token, and the median of the steps after that."""

    first_token: float
    step: float


def generate(llama: Llama, lengths: list[int], new: int) -> Timing:
    """Generate `new` tokens greedily after random prompts of these lengths, all in one batch."""
    vocab_size = llama.model.params.vocab_size
    params = SamplingParams(temperature=0, max_tokens=new)
    prompts = [torch.randint(vocab_size, (length,)).tolist() for length in lengths]
    start = time.perf_counter()
    requests = [llama.engine.add(prompt, params) for prompt in prompts]
    while not all(request.tokens for request in requests):
        llama.engine.step()
    first, steps = time.perf_counter(), []
    before = first
    while llama.engine.has_work():
        llama.engine.step()
        steps.append(-before + (before := time.perf_counter()))
    return Timing(first - start, statistics.median(steps))


def bytes_per_step(model: Transformer, batch: int, context: int) -> int:
    """Bytes one decode step reads: every weight once, embeddings only if they are also the output layer,
    and the live cache."""
    weights, embeddings = resident_bytes(model), model.tok_embeddings
    if embeddings.backend and embeddings.backend is not model.output.backend:
        weights -= embeddings.backend.nbytes
    elif not embeddings.backend and embeddings.weight is not getattr(model.output, "weight", None):
        weights -= embeddings.weight.nbytes
    return weights + model.cache.data[:, :, :batch, :, :context].nbytes


def prefill_flops(model: Transformer, batch: int, prompt: int) -> int:
    """Operations of the matrices for all tokens, the last token's logits, and causal attention's two
    products."""
    args = model.params
    with torch.device("meta"):
        layers = Transformer(args, model.parallel).layers
    matrices = sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
    attention = args.n_layers * prompt**2 * args.dim // model.parallel.size
    return batch * (
        2 * matrices * prompt + 2 * args.vocab_size * args.dim // model.parallel.size + 2 * attention
    )


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second read on the CPU, or read and written by a copy on another device."""
    cpu = device.type == "cpu"
    # On a CPU 1.07 GB: a server's last cache has up to hundreds of MB, and speeds up what is not much larger.
    buffer = torch.ones(2**28 if cpu else 2**26, dtype=torch.float32, device=device)
    if cpu:
        # A core reads faster from two places than from one, but a dot product may run on one core only.
        first, second = buffer.chunk(2)
        return buffer.nbytes / min(best(device, lambda: first.dot(second)), best(device, buffer.max))
    other = torch.empty_like(buffer)
    return 2 * buffer.nbytes / best(device, lambda: other.copy_(buffer))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a product of large square matrices."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / best(device, lambda: a @ b)


def best(device: torch.device, call: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest of several calls."""
    seconds = math.inf
    for _ in range(times):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds


def peak_memory() -> int:
    """Most bytes of memory that this process, or its CUDA device, has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def peak_resident() -> int:
    """Most bytes of memory that this process has held, including mapped files' pages; 0 if unknown."""
    # On Linux; getrusage there starts from the parent's peak.
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
