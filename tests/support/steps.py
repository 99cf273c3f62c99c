"""Compiled steps of small random models, with weights of any kind."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llama.backends.native import NativeStep, PackedMatrix, pack, pack_quantized
from llama.model import Row, Transformer
from llama.parallel import Linear, VocabParallelEmbedding
from llama.quantization import QuantizedMatrix, Weight
from llama.quantizer import quantize
from tests.support import tiny

LONG = 600  # positions: more than two chunks of attention; the last are not a whole tile of the cache


def random_model(dtype: torch.dtype = torch.float32, **args: object) -> Transformer:
    shape = {"dim": 96, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "head_dim": 16, "multiple_of": 32}
    model = tiny.random_model(std=0.12, **{**shape, "max_seq_len": LONG + 2, **args}).to(dtype)
    model.allocate_cache()
    return model


def weight_of(weight: Tensor, kind: str) -> Weight:
    """A plain weight in a kind's form."""
    if kind in ("fp32", "bf16"):
        return weight.detach()
    quantized = quantize(weight, int(kind[3]))
    if "symmetric" not in kind:
        return quantized
    middle = 2 ** (quantized.bits - 1)
    scales = (weight.unflatten(1, (-1, 32)).abs().amax(-1) / middle).half()
    return QuantizedMatrix(quantized.values, scales)


def steps_of(
    model: Transformer,
    kind: str,
    target: str | None,
    threads: Sequence[int] = (2,),
    in_place: bool = False,
    others: Mapping[str, str] = {},
) -> list[NativeStep]:
    """Steps of a model that keeps its weights; those of quantized kinds become what is computed with.

    others: kinds of some matrices, by their last name.
    """
    packed: dict[int, PackedMatrix] = {}
    modules = {n: m for n, m in model.named_modules() if isinstance(m, Linear | VocabParallelEmbedding)}
    for name, module in modules.items():
        weight = weight_of(module.weight, others.get(name.rpartition(".")[2], kind))
        key = module.weight.data_ptr()  # the same if they are tied
        if isinstance(weight, QuantizedMatrix):
            packed[key] = packed.get(key) or pack_quantized(weight, target=target)
            module.weight.copy_(weight.dequantize())
        else:
            packed[key] = packed.get(key) or pack(weight, target=target, in_place=in_place)
        module.backend = packed[key]
    steps = [NativeStep(model, n, target) for n in threads]
    for module in modules.values():
        module.backend = None
    return steps


def step_of(model: Transformer, kind: str, target: str | None = None, in_place: bool = False) -> NativeStep:
    return steps_of(model, kind, target, in_place=in_place)[0]


def cached(model: Transformer, step: NativeStep) -> Tensor:
    """A copy of a model's cache, with the keys by position, which a step has in tiles."""
    data, lanes = model.cache.data.clone(), step.library.llama_lanes()
    keys = data[:, 0, ..., : data.shape[-2] // lanes * lanes, :]
    together = 4 // keys.itemsize  # numbers in a unit
    units = keys.reshape(-1, keys.shape[-1] // together, lanes, together)
    keys.copy_(units.transpose(1, 2).reshape(keys.shape))
    return data


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind == "bf16" else torch.float32


def ids(n: int, seed: int = 1) -> Tensor:
    return torch.randint(tiny.VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def run(model: Transformer, step: NativeStep, tokens: Tensor, rows: Sequence[Row] = ()) -> Tensor:
    """The hidden states of a step; rows: by default all tokens in slot 0."""
    rows = rows or [Row(0, 0, len(tokens))]
    return step.hidden(tokens, rows, model.cache.data, model.rotations)
