"""Errors meant for users: each names what was given, what was expected, and what to do.

A command prints one of these without a traceback; any other exception is a bug in this package and
keeps its traceback.
"""


class LlamaError(Exception):
    """A mistake in this package's input, explained in one message."""


class ArgumentError(LlamaError, ValueError):
    """An argument that is out of range, of the wrong type, or does not fit the model."""


class PromptError(ArgumentError):
    """A prompt that cannot be continued: empty, too long, or with ids outside the vocabulary."""


class CheckpointError(LlamaError, ValueError):
    """A checkpoint that is incomplete, damaged, or inconsistent with its configuration."""


class MissingPackageError(LlamaError, ImportError):
    """An optional package is needed but not installed."""


class OutOfMemoryError(LlamaError, MemoryError):
    """Weights and cache exceed the device's memory."""


class RankError(LlamaError, RuntimeError):
    """Another rank failed or disappeared, so this one cannot continue."""


def shown(value: object) -> str:
    """A value for an error message: its beginning, without control characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_number(name: str, value: object, most: float) -> None:
    """Raise ArgumentError unless a value is a positive number.

    most: the largest value allowed; if it is an int, the value must be one too.
    """
    kind, least = (int, 1.0) if isinstance(most, int) else ((int, float), 1 / most)
    word = "whole number" if kind is int else "number"
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
        raise ArgumentError(f"{name} must be a positive {word} of at most {most:g}, not {shown(value)}")
