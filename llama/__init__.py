"""A native runtime for Meta's Llama models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.generation import Llama
    from llama.guard import Guard
    from llama.model import ModelArgs, Transformer
    from llama.sampling import SamplingParams
    from llama.streaming import StreamEvent
    from llama.tokenizer import Dialog, Tokenizer

__version__ = "0.2.0"
__all__ = [
    "Dialog",
    "Guard",
    "Llama",
    "ModelArgs",
    "SamplingParams",
    "StreamEvent",
    "Tokenizer",
    "Transformer",
]

# Imported on first use: torch takes seconds, and `llama --help` does not need it.
_HOMES = {
    "Dialog": "tokenizer",
    "Guard": "guard",
    "Llama": "generation",
    "ModelArgs": "model",
    "SamplingParams": "sampling",
    "StreamEvent": "streaming",
    "Tokenizer": "tokenizer",
    "Transformer": "model",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"llama.{_HOMES[name]}"), name)
    if name in _HOMES.values():
        return import_module(f"llama.{name}")
    raise AttributeError(f"module 'llama' has no attribute {name!r}")
