"""What the tests of quantized weights share."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama import Llama

TOKENS = torch.arange(3 * 16).view(3, 16)
x86 = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this CPU has no such operators"
)


def distance(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference relative to the exact value's."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def build(folder: Path, scheme: str | None = None) -> Llama:
    return Llama.build(
        folder, max_seq_len=32, max_batch_size=3, dtype="float32", device="cpu", quantize=scheme
    )
