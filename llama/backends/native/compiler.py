"""The C++ source, compiled on first use by the system's compiler and cached."""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from llama.device import cache_folder

HEADERS = ("attention", "draw", "image", "product", "quantize", "threads", "matrix")
SOURCES = [Path(__file__).with_name(name) for name in ("step.cpp", *(f"{header}.h" for header in HEADERS))]
NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}


class UnavailableError(Exception):
    """Why there is no native step here, as a clause that can end a sentence."""


class Matrix(ctypes.Structure):
    """As in step.cpp, like the structures below."""

    _fields_ = [
        *((name, c_int32) for name in ("kind", "rows", "cols", "tiled")),
        *((name, c_void_p) for name in ("weight", "scale", "min")),
        ("parts", c_int32),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "q_norm", "gate_attn", "gate_ffwd")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size",
                "max_batch_size", "max_seq_len", "cache_kind",
            )
        ),
        ("norm_eps", c_float),
        ("layers", POINTER(Layer)),
        ("tok_embeddings", Matrix),
        ("output", Matrix),
        ("norm", c_void_p),
        ("n_cross", c_int32),
        ("image_positions", c_int32),
        ("cross", POINTER(Layer)),
        ("fusion", POINTER(c_int32)),
        ("added_embeddings", c_void_p),
    ]  # fmt: skip


class Row(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("slot", "start", "length")]


class Sight(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("first", "count", "slot", "begin", "end")]


class Draw(ctypes.Structure):
    _fields_ = [
        ("key", c_int64),
        *((name, c_float) for name in ("temperature", "top_p", "min_p")),
        ("top_k", c_int32),
    ]


SIGNATURES: dict[str, list[Any]] = {  # each function's result and arguments
    "llama_lanes": [c_int32],
    "llama_tile_bytes": [c_int64, c_int32, c_int32],
    "llama_pack": [None, c_int32, c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p, c_int32],
    "llama_pack_scales": [None, c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p, c_int32],
    "llama_quantize": [None, *(c_int32,) * 2, c_void_p, c_int64, *(c_int32,) * 2, *(c_void_p,) * 4, c_int32],
    "llama_multiply": [None, POINTER(Matrix), c_void_p, c_int32, c_void_p, c_int32],
    "llama_rows": [None, POINTER(Matrix), c_void_p, c_int32, c_void_p],
    "llama_widen": [None, POINTER(Matrix), c_void_p, c_int32],
    "llama_sees": [c_int32],
    "llama_attend_image": [None, c_void_p, *(c_int32,) * 4, c_void_p, c_void_p, c_int32],
    "llama_new": [c_void_p, POINTER(Model), c_int32],
    "llama_free": [None, c_void_p],
    "llama_hidden": [
        *(None, c_void_p, c_void_p, POINTER(Row), c_int32, c_void_p, c_void_p),
        *(POINTER(Sight), c_int32, c_void_p, c_void_p),
    ],
    "llama_logits": [None, c_void_p, c_void_p, c_int32, c_void_p],
    "llama_choose": [None, c_void_p, c_void_p, c_int32, POINTER(Draw), c_void_p],
    "llama_next": [
        *(None, c_void_p, c_void_p, POINTER(Row), c_int32, c_void_p, c_void_p),
        *(POINTER(Draw), c_void_p),
    ],
}


@cache
def library(target: str | None = None) -> ctypes.CDLL:
    """The compiled source, from the cache if it has been compiled before.

    target: the compiler's option for the processor; by default this machine's own, "" for the baseline of
    its architecture.

    Raises UnavailableError if there is no compiler or it fails.
    """
    if target is None:
        target = NATIVE.get(platform.machine(), "")
    loaded = ctypes.CDLL(str(compiled(target, _private(cache_folder() / "native"))))
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def compiled(target: str, folder: Path) -> Path:
    """The shared library for a target in a folder; compiled if missing, with a message on stderr."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise UnavailableError("no C++ compiler was found (install g++ or clang++, or set CXX)")
    options = ["-O3", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
    command = [compiler, *options, *([target] if target else [])]
    # Everything the result depends on: machines may share the folder, and compilers may be updated.
    key = hashlib.sha256("\0".join([*command, _run([compiler, "--version"]), _processor()]).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    path = folder / f"step-{key.hexdigest()[:24]}.so"
    if not path.exists():
        print("Compiling the CPU kernels ...", file=sys.stderr)
        handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            _run([*command, str(SOURCES[0]), "-o", unfinished])
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return path


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{command[0]} failed: {_error_line(error.stderr)}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{command[0]} could not be run: {error}") from None
    return done.stdout


def _error_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it printed nothing"]
    return next((line for line in lines if "error" in line), lines[0])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return " ".join(platform.uname())
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _private(folder: Path) -> Path:
    """The folder, created if necessary and private: a library put there by others would run as ours."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise UnavailableError(f"{folder} cannot be used: {error.strerror} (set LLAMA_CACHE)") from None
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnavailableError(f"others can write to {folder} (run chmod go-w, or set LLAMA_CACHE)")
    return folder
