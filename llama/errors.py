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
