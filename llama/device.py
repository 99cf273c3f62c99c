"""Which device, which dtype, and whether a model fits."""

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama.errors import ArgumentError


def default_device() -> torch.device:
    """This rank's CUDA device, else MPS, else the CPU.

    Raises ValueError if `torchrun` started more ranks on this machine than it has CUDA devices.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= (count := torch.cuda.device_count()):
            raise ArgumentError(
                f"rank {local_rank} on this machine has no CUDA device of its own: only {count} found; "
                f"start with --nproc_per_node {count}, or pass device='cpu'"
            )
        return torch.device("cuda", local_rank)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def parse_device(device: str | torch.device) -> torch.device:
    """A device of this machine, by name or as is; "cuda" is this rank's. Raises ArgumentError if absent."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda", "mps"):
        raise ArgumentError(f"device must be cpu, cuda, cuda:N or mps, not {str(device)!r}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ArgumentError("device is mps, but PyTorch finds no Apple GPU here; use cpu")
    if found.type == "cuda":
        rank = int(os.environ.get("LOCAL_RANK", 0))
        found = torch.device("cuda", rank if found.index is None else found.index)
        if found.index >= (count := torch.cuda.device_count()):
            raise ArgumentError(f"device is {found}, but PyTorch finds {count} CUDA devices here; use cpu")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 if the device computes in it; else fp16, or fp32 on a CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        try:
            torch.zeros(1, dtype=torch.bfloat16, device=device)
        except (RuntimeError, TypeError):
            return torch.float16
        return torch.bfloat16
    # Without bf16 instructions a CPU spends more on conversion than it saves in bandwidth.
    try:
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return torch.float32


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype, by name or as is. Raises ValueError for one that models cannot run in."""
    names = {
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
        "float32": torch.float32,
        "fp32": torch.float32,
    }
    found = names.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in names.values():
        raise ArgumentError(f"dtype must be bfloat16, float16 or float32, not {dtype!r}")
    return found


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The host's values as a tensor on a device, copied without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory that this rank may use; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks
    except (AttributeError, ValueError, OSError):
        return None


def cache_folder() -> Path:
    """Where this package keeps files between runs: $LLAMA_CACHE, else ~/.cache/llama."""
    return Path(os.environ.get("LLAMA_CACHE") or Path.home() / ".cache" / "llama")


def gigabytes(n: float) -> str:
    """Bytes as text such as 1.23 GB (powers of ten), or in MB below 1 GB."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def resident_bytes(model: nn.Module) -> int:
    """Bytes that a loaded model's weights take, in whatever form; shared ones count once."""
    backends = {getattr(module, "backend", None) for module in model.modules()}
    products = [backend.nbytes for backend in backends if backend is not None]
    return sum(products) + sum(weight.nbytes for weight in model.parameters())


class _OneThread(contextlib.AbstractContextManager[None]):
    """Keeps PyTorch to the calling threads for a while; may be entered by several at once.

    Its other threads spin after every operator, on cores that a step backend's own threads need.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._threads = 1

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._threads = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)  # for this thread, and for those that have not used PyTorch yet

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            torch.set_num_threads(self._threads)


one_thread = _OneThread()
