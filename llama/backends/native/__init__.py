"""A whole step of the model in one call of compiled code, on a CPU: step.cpp mirrors model.py."""

from llama.backends.native.compiler import UnavailableError, library
from llama.backends.native.quantize import search
from llama.backends.native.step import (
    NativeStep,
    PackedMatrix,
    Widened,
    attend_image,
    check,
    is_sensitive,
    pack,
    pack_quantized,
)

__all__ = [
    "NativeStep",
    "PackedMatrix",
    "UnavailableError",
    "Widened",
    "attend_image",
    "check",
    "is_sensitive",
    "library",
    "pack",
    "pack_quantized",
    "search",
]
