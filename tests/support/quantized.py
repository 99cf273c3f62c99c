"""What the tests of quantized weights share."""

from pathlib import Path

import torch
from torch import Tensor

from llama import Llama
from llama.backends import Plan
from llama.backends.grouped import Grouped
from llama.backends.onednn import Packed
from llama.loading import load_weights
from llama.model import Transformer
from llama.parallel import Span
from llama.vision import make_model

TOKENS = torch.arange(3 * 16).view(3, 16)
PACKED = Plan(plain=Packed, joins=True, least_rows=4)
KEPT = Plan(quantized=Grouped, joins=True)  # as a CUDA device does with quantized weights


def distance(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference relative to the exact value's."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def build(folder: Path, scheme: str | None = None) -> Llama:
    return Llama.build(
        folder, max_seq_len=32, max_batch_size=3, dtype="float32", device="cpu", quantize=scheme
    )


class Held:
    """The weights of a model in memory, as a `TensorSource`."""

    def __init__(self, model: Transformer) -> None:
        self.weights, self.dtype = model.state_dict(), model.dtype
        self.shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        start, stop = span or (0, self.shapes[name][dim])
        return self.weights[name].narrow(dim, start, stop - start)

    def release(self) -> None: ...


def reloaded(model: Transformer, plan: Plan, scheme: str | None = None) -> Transformer:
    """The same model, as a plan would load it."""
    with torch.device("meta"):
        other = make_model(model.params)
    load_weights(other, Held(model), plan, model.device, model.dtype, scheme)
    return other
