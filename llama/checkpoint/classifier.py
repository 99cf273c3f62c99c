"""The head of a classifier: Hugging Face's LlamaForSequenceClassification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.checkpoint.source import Classifier
from llama.errors import CheckpointError

ARCHITECTURE = "LlamaForSequenceClassification"
SCORE = "score.weight"


def is_classifier(config: Mapping[str, Any]) -> bool:
    return ARCHITECTURE in (config.get("architectures") or ())


def read_classifier(
    path: Path, config: Mapping[str, Any], dim: int, read: Callable[[str], Any]
) -> Classifier:
    """The labels of a config.json and the matrix that scores them.

    dim: of the model.
    read: returns a stored tensor by name.

    Raises CheckpointError if labels and matrix do not match.
    """
    weight: Tensor = read(SCORE)[:]
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(len(weight))}
    labels = [names.get(str(i)) for i in range(len(weight))] if isinstance(names, dict) else []
    if weight.shape != (len(labels), dim) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(
            f"{SCORE} has shape {tuple(weight.shape)}, but {path} implies ({len(names)}, {dim}): "
            "num_labels and id2label must cover every row"
        )
    if len(names) != len(labels):
        raise CheckpointError(f"{path} names {len(names)} labels, but {SCORE} has {len(labels)} rows")
    return Classifier([str(label) for label in labels], weight)
