"""A model's weights as in Hugging Face's files, from any source."""

from __future__ import annotations

import torch
from torch import Tensor

from llama.checkpoint.huggingface import hf_name, rotary_heads, to_hf_rows
from llama.checkpoint.mllama import file_shape, is_table, mllama_name, to_table
from llama.checkpoint.source import TensorSource
from llama.model import ModelArgs
from llama.quantization import EMBEDDINGS, LEARNABLE
from llama.vision import VisionArgs


class HFView:
    """A model's weights as in Hugging Face's files: under other names, and some in another order.

    shapes: of all tensors, by Hugging Face's names
    """

    def __init__(self, source: TensorSource, args: ModelArgs) -> None:
        self.source, self.args = source, args
        self.names = {hf_name(name): name for name in source.shapes}
        self.shapes = {hf: source.shapes[name] for hf, name in self.names.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1, which must be whole heads of a query or key matrix."""
        native = self.names[name]
        rows = self.source.read(native, 0, (start, stop))
        rotary = rotary_heads(native, self.args) is not None
        return to_hf_rows(rows, self.args.head_dim) if rotary else rows


class MllamaView(HFView):
    """`HFView` for a vision model."""

    def __init__(self, source: TensorSource, args: VisionArgs) -> None:
        self.source, self.args = source, args
        self.names = {mllama_name(name, args): name for name in source.shapes if name != LEARNABLE}
        shapes = source.shapes
        self.shapes = {hf: file_shape(name, shapes[name], args) for hf, name in self.names.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        native = self.names[name]
        shape = self.source.shapes[native]
        if native == EMBEDDINGS and stop > shape[0]:
            parts = [(EMBEDDINGS, start, shape[0]), (LEARNABLE, max(0, start - shape[0]), stop - shape[0])]
            return torch.cat([self.source.read(part, 0, (a, b)) for part, a, b in parts if a < b])
        if is_table(native):
            return to_table(self.source.read(native))[start:stop]
        return super().read(name, start, stop).reshape(stop - start, *self.shapes[name][1:])


def hf_view(source: TensorSource, args: ModelArgs) -> HFView:
    """The view for a model."""
    return MllamaView(source, args) if isinstance(args, VisionArgs) else HFView(source, args)
