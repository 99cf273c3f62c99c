"""The binding to quantize.h: the search for a quantized matrix, in compiled code on every thread."""

import torch
from torch import Tensor

from llama.backends.native.compiler import UnavailableError, library
from llama.backends.native.step import PLAIN_KINDS
from llama.quantization import QuantizedMatrix
from llama.quantizer import search_in_chunks


def search(
    weight: Tensor, found: QuantizedMatrix, importance: Tensor | None, target: str | None = None
) -> None:
    """Like `search_in_chunks`, which serves if there is no compiler. target: see `library`.

    Sums are taken in another order, so of two almost equally good values the other may be chosen.
    """
    try:
        lib = library(target)
    except UnavailableError:
        return search_in_chunks(weight, found, importance)
    weight = weight if weight.dtype in PLAIN_KINDS else weight.float()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    counts = None if importance is None else importance.to("cpu", torch.float32).contiguous()
    lib.llama_quantize(
        found.bits,
        PLAIN_KINDS[weight.dtype],
        weight.data_ptr(),
        weight.stride(0) * weight.itemsize,
        *weight.shape,
        None if counts is None else counts.data_ptr(),
        found.values.data_ptr(),
        found.scales.data_ptr(),
        None if found.mins is None else found.mins.data_ptr(),
        torch.get_num_threads(),
    )
    return None
