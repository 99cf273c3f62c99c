"""How a matrix, or a whole step, is computed: one file per backend, and one place that chooses."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llama.backends import native
from llama.backends.grouped import Grouped
from llama.backends.onednn import Packed, can_pack
from llama.backends.torchao import Float8
from llama.device import default_dtype
from llama.model import StepBackend, Transformer
from llama.parallel import Product
from llama.quantization import QuantizedMatrix, Weight, joined
from llama.quantizer import SEARCHES
from llama.vision import Padding, VisionTransformer, reads_images

SEARCHES["cpu"] = native.search


@dataclass(frozen=True)
class Plan:
    """How a machine will compute a model.

    plain: makes the product for a plain weight, x (…, in) to (…, out). None: F.linear with the weight.
    quantized: the same for a quantized weight. None: it is dequantized as it loads, and is then plain.
    sensitive: the same for the matrices that lose most if activations have 8 bits. None: `quantized`.
    joins: whether matrices with the same input are applied as one.
    embeddings: whether the embeddings are a product too; shared with the output layer if they are tied.
    least_rows: the minimum number of rows worth passing to a product.
    step: makes the backend for whole steps of a model that has its weights.
    missing: why there is no such step.
    attend: replaces attention among the tokens of an image; see `ImageAttention`.
    images: for matrices that are applied to whole images, thousands of rows at once. None: the same plan.
    """

    plain: Callable[[Tensor], Product] | None = None
    quantized: Callable[[QuantizedMatrix], Product] | None = None
    sensitive: Callable[[QuantizedMatrix], Product] | None = None
    joins: bool = False
    embeddings: bool = False
    least_rows: int = 1
    step: Callable[[Transformer], StepBackend] | None = None
    missing: str = ""
    attend: Callable[[Tensor, Padding], Tensor] | None = None
    images: "Plan | None" = None

    def of(self, name: str) -> "Plan":
        """The plan for a matrix, by its name."""
        if self.images and reads_images(name):
            return self.images
        return (
            replace(self, quantized=self.sensitive) if self.sensitive and native.is_sensitive(name) else self
        )

    def product(self, *weights: Weight) -> Product | None:
        """The product for a weight, or for several that are `alike`, joined; None for F.linear.

        Always None for a part without a single value: kernels refuse it.
        """
        if 0 in weights[0].shape:
            return None
        make: Any = self.quantized if isinstance(weights[0], QuantizedMatrix) else self.plain
        return make(joined(weights)) if make else None


def fastest_dtype(model: Transformer, device: torch.device, *, whole_steps: bool = True) -> torch.dtype:
    """The dtype in which a machine computes a model fastest: the device's own, or bf16 in a whole step.

    On a CPU without bf16 instructions, the step still reads half the bytes, and computes in fp32. Not so the
    image encoder.
    """
    if device.type == "cpu" and whole_steps and not isinstance(model, VisionTransformer):
        with contextlib.suppress(native.UnavailableError):
            native.check(model, device, torch.bfloat16)
            return torch.bfloat16
    return default_dtype(device)


def plan(
    model: Transformer,
    device: torch.device,
    dtype: torch.dtype,
    scheme: str | None = None,
    *,
    whole_steps: bool = True,
    mapped: bool = False,
    threads: int | None = None,
) -> Plan:
    """The best plan for a model (which may still be on the meta device), for a device and dtype.

    scheme: "fp8" to compute with plain weights in fp8.
    whole_steps: whether one call, opaque to compilers, may replace the model's layers.
    mapped: leave plain weights mapped from their files.
    threads: for a whole step; by default as many as PyTorch uses.
    """
    if scheme == "fp8":
        return Plan(plain=Float8, joins=True)
    if device.type == "cuda":
        return Plan(quantized=Grouped, joins=True, missing="it is for CPUs, but this model is on cuda")
    missing, packs = "a compiler needs to see each layer", can_pack(device, dtype) and not mapped
    if whole_steps:
        try:
            native.check(model, device, dtype)
            return Plan(
                plain=partial(native.pack, in_place=mapped),
                quantized=native.pack_quantized,
                embeddings=True,
                step=partial(native.NativeStep, threads=threads),
                attend=native.attend_image,
                images=Plan(Packed if packs else None, native.Widened, joins=packs),
            )
        except native.UnavailableError as error:
            missing = str(error)
    others = Plan(joins=device.type != "cpu", missing=missing)
    if packs:
        # oneDNN 3.12 takes 1.3 times as long for one to three rows as for four.
        others = Plan(plain=Packed, joins=True, least_rows=4 if scheme is None else 1, missing=missing)
    if whole_steps and device.type == "cpu":
        with contextlib.suppress(native.UnavailableError):
            native.library()
            images = replace(others, quantized=native.Widened)
            return replace(
                others,
                quantized=native.pack_quantized,
                sensitive=partial(native.pack_quantized, parts=2),
                attend=native.attend_image,
                images=images,
            )
    return others
