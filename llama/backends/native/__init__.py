"""A whole step of the model in one call of compiled code, on a CPU: step.cpp beside model.py."""

from llama.backends.native.compiler import UnavailableError, library
from llama.backends.native.step import NativeStep, PackedMatrix, check, native_step, pack, pack_groups

__all__ = [
    "NativeStep",
    "PackedMatrix",
    "UnavailableError",
    "check",
    "library",
    "native_step",
    "pack",
    "pack_groups",
]
