"""Errors that are sentences: each names what was given, what was expected, and what to do.

A command prints one of these without a stack; any other exception is a fault of this package and
keeps its stack.
"""


class LlamaError(Exception):
    """A mistake in what this package was given, told in one sentence."""


class ArgumentError(LlamaError, ValueError):
    """An argument that is out of range, of the wrong type, or does not fit the model."""


class PromptError(ArgumentError):
    """A prompt that cannot be generated from: empty, too long, or with ids outside the vocabulary."""


class CheckpointError(LlamaError, ValueError):
    """A checkpoint that is incomplete, damaged, or not what its configuration says."""


class MissingPackageError(LlamaError, ImportError):
    """An optional package is needed and not installed."""


class OutOfMemoryError(LlamaError, MemoryError):
    """Weights and cache are larger than the device's memory."""


class RankError(LlamaError, RuntimeError):
    """Another rank failed or disappeared, so this one cannot go on."""


def shown(value: object) -> str:
    """A value for an error: its beginning, without control characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_number(name: str, value: object, most: float) -> None:
    """Raise ArgumentError unless a value is a positive number.

    most: the largest that is allowed; if it is whole, so must the value be.
    """
    kind, least = (int, 1.0) if isinstance(most, int) else ((int, float), 1 / most)
    word = "whole number" if kind is int else "number"
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
        raise ArgumentError(f"{name} must be a positive {word} of at most {most:g}, not {shown(value)}")
