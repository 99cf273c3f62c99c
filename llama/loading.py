"""From a checkpoint to a ready model: check memory, choose the backend, load, warm up."""

import math
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llama import backends
from llama.backends import Plan
from llama.backends.torchao import check_float8
from llama.checkpoint.reader import RankReader
from llama.checkpoint.source import Checkpoint, TensorSource, is_tied, stored_bits
from llama.device import gigabytes, total_memory
from llama.engine import Engine
from llama.engine.static import compile_blocks
from llama.errors import ArgumentError, OutOfMemoryError
from llama.model import ModelArgs, Transformer
from llama.parallel import Joined, Linear, ModelParallel, VocabParallelEmbedding
from llama.quantization import (
    EMBEDDINGS,
    GROUP,
    OUTPUT,
    QUANTIZATIONS,
    SCHEMES,
    STORED_BITS,
    QuantizedMatrix,
    Weight,
    alike,
    few_bits,
    plain,
)
from llama.quantizer import quantize
from llama.ranks import together
from llama.sampling import SamplingParams
from llama.vision import ImageAttention, VisionModel, VisionTransformer, make_model

Applied = Linear | Joined | VocabParallelEmbedding


def load(
    checkpoint: Checkpoint,
    args: ModelArgs,
    group: ModelParallel,
    device: torch.device,
    dtype: torch.dtype | None = None,
    scheme: str | None = None,
    *,
    whole_steps: bool = True,
    mapped: bool = False,
    threads: int | None = None,
) -> Transformer:
    """This rank's part of a checkpoint's model, with its cache allocated.

    dtype: None for the fastest. scheme: from `scheme_of`. whole_steps, mapped, threads: see `backends.plan`.
    Reports progress on rank 0's stderr. Raises what `Llama.build` raises.
    """
    start = time.perf_counter()
    with torch.device("meta"):
        model = make_model(args, group)
    dtype = dtype or backends.fastest_dtype(model, device, whole_steps=whole_steps)
    plan = backends.plan(
        model, device, dtype, scheme, whole_steps=whole_steps, mapped=mapped, threads=threads
    )
    resident = weight_bytes(model, checkpoint.weights, plan, dtype, scheme)
    cache = math.prod(model.cache_shape()) * dtype.itemsize
    sequences = f"max_batch_size={args.max_batch_size}, max_seq_len={args.max_seq_len}"
    if isinstance(model, VisionTransformer):
        cache += math.prod(model.image_cache_shape()) * dtype.itemsize
        sequences += f", max_images={model.params.max_images}"
    memory = total_memory(device)
    if memory is not None and cache + (0 if mapped else resident) > memory:
        raise OutOfMemoryError(
            f"weights of {gigabytes(resident)} and a KV cache of {gigabytes(cache)} ({sequences}) do not "
            f"fit in the {gigabytes(memory)} of {device}: lower max_seq_len or max_batch_size, "
            "or use more ranks"
        )

    def say(text: str) -> None:
        if group.rank == 0:
            print(text, file=sys.stderr)

    if checkpoint.context is not None and args.max_seq_len > checkpoint.context:
        say(
            f"warning: max_seq_len={args.max_seq_len} is more than the {checkpoint.context} tokens that this "
            f"{checkpoint.family} model was trained for; quality degrades beyond them"
        )
    if whole_steps and plan.missing:
        say(f"Running on PyTorch's operators, without the compiled step: {plan.missing}")
    number = str(dtype).removeprefix("torch.")
    if scheme not in (None, "fp8") and plan.quantized is None:
        say(f"The {scheme} weights are dequantized to {number} for PyTorch's operators")
    if isinstance(model, VisionTransformer):
        defer_tower(model, checkpoint.weights, plan, device, dtype, scheme)
    load_weights(model, checkpoint.weights, plan, device, dtype, scheme)
    share = f", {group.size} ranks" if group.size > 1 else ""
    say(
        f"Loaded {checkpoint.path.resolve().name}: {checkpoint.files} file(s), {gigabytes(resident)} "
        f"in {scheme or number} on {device}{share}, {time.perf_counter() - start:.1f} s"
    )
    say(f"KV cache: {gigabytes(cache)} for {sequences}")
    model.allocate_cache()
    return model


def defer_tower(
    model: VisionTransformer,
    source: TensorSource,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    scheme: str | None,
) -> None:
    """Make a vision model load its image encoder with the first image; arguments as for `load_weights`."""
    tower = model.vision_model
    del model.vision_model

    @torch.inference_mode(False)
    def load_tower() -> None:
        with together(model.parallel):
            load_weights(tower, source, plan, device, dtype, scheme, prefix="vision_model.")
        model.vision_model = tower

    model.load_tower = load_tower


def warm_up(engine: Engine, required: bool) -> None:
    """Compile the model's blocks and decode a little, so that no request has to wait for it.

    If that fails, prints why and leaves the model uncompiled; raises RuntimeError if it is required.
    """
    start = time.perf_counter()
    model = engine.model
    compile_blocks(model)
    prompt = [0] * min(5, model.params.max_seq_len - 1)
    try:
        for count in sorted({1, model.params.max_batch_size}):  # a single row has its own kernels
            for _ in engine.run([engine.add(prompt, SamplingParams(max_tokens=3)) for _ in range(count)]):
                pass
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        engine.close()
        if required or model.parallel.size > 1:
            raise RuntimeError(f"compilation failed, build with compile=False: {reason}") from error
        print(f"Compilation failed, continuing without it: {reason}", file=sys.stderr)
        for module in model.modules():
            module._compiled_call_impl = None
    engine.forget()  # nothing in the cache is worth reusing
    if engine.static and model.parallel.rank == 0:
        print(f"Compiled: {time.perf_counter() - start:.1f} s", file=sys.stderr)


def check_quantize(scheme: str | None, device: torch.device) -> None:
    """Raise ArgumentError for a scheme that is unknown or that the device cannot run.

    Raises MissingPackageError if it needs a package that is not installed.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise ArgumentError(f"quantize must be None or one of {', '.join(SCHEMES)}, not {scheme!r}")
    if scheme == "fp8":
        check_float8(device)


def scheme_of(checkpoint: Checkpoint, asked: str | None) -> str | None:
    """What a model's weights are quantized to: as requested, else as stored.

    Raises ArgumentError if quantized weights would have to be quantized differently.
    """
    stored = checkpoint.quantization
    if stored in QUANTIZATIONS and asked not in (None, stored):
        raise ArgumentError(
            f"{checkpoint.path} holds {stored} weights, so quantize={asked!r} is not possible: leave it out, "
            "or use the folder they were quantized from"
        )
    return asked or stored


def weight_bytes(
    model: Transformer,
    source: TensorSource,
    plan: Plan,
    dtype: torch.dtype,
    scheme: str | None,
    embeddings: bool = True,
) -> int:
    """Bytes that a model's weights take once loaded; arguments as for `load_weights`.

    embeddings: False leaves them out, as a decode step does; the output layer still counts.
    """
    plain = dtype.itemsize * 8.0

    def held(name: str, weight: Tensor) -> float:
        """Bits per number of a weight."""
        if weight.dim() == 1 or weight.shape[1] % GROUP or (name == EMBEDDINGS and not plan.embeddings):
            return plain
        few = min(filter(None, (stored_bits(source, name), few_bits(scheme, name))), default=None)
        return STORED_BITS[few] if few and plan.of(name).quantized else 8 if scheme == "fp8" else plain

    bits = {name: weight.numel() * held(name, weight) for name, weight in model.named_parameters()}
    product = plan.plain or bits[OUTPUT] < plain * model.output.weight.numel()
    if not embeddings or (is_tied(source.shapes) and (plan.embeddings or not product)):
        del bits[EMBEDDINGS]  # otherwise one tensor is both
    return int(sum(bits.values()) / 8)


def matrices(model: nn.Module) -> list[tuple[Applied, Mapping[str, Applied]]]:
    """The modules that apply one matrix each, with their linear layers by the names of the weights."""
    linears = {
        module: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)
    }
    joined = [module for module in model.modules() if isinstance(module, Joined)]
    found = [(module, {linears.pop(part): part for part in module.parts}) for module in joined]
    return [*found, *((linear, {name: linear}) for linear, name in linears.items())]


def load_weights(
    model: Transformer | VisionModel,
    source: TensorSource,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    scheme: str | None = None,
    prefix: str = "",
) -> None:
    """Fill a model that was built on the meta device, one matrix at a time.

    dtype: of everything that is not quantized.
    scheme: what matrices are quantized to as they are read; those with as few bits already are kept.
    prefix: of the source's names, if `model` is part of a model.
    """
    kept: dict[str, Tensor] = {}
    text = model if isinstance(model, Transformer) else None
    with RankReader(model, source, prefix) as reader:

        def read(name: str) -> Weight:
            bits, keeps = few_bits(scheme, name), plan.of(prefix + name).quantized
            weight = reader.read(name, quantized=bool(keeps or bits))
            if bits and 0 not in weight.shape:
                weight = quantize(weight.to(device), bits)
            if isinstance(weight, QuantizedMatrix):
                return weight.to(device) if keeps else weight.dequantize(dtype).to(device)
            return weight.to(device, dtype)

        def fill(module: Applied, parts: Mapping[str, Applied]) -> None:
            weights, own = {name: read(name) for name in parts}, plan.of(prefix + next(iter(parts)))
            if own.step and not alike([*weights.values()]):  # parts with the same input need the same form
                same = 8 if all(isinstance(weight, QuantizedMatrix) for weight in weights.values()) else None
                weights = {name: quantize(plain(weight).to(dtype), same) for name, weight in weights.items()}
            if own.joins and alike([*weights.values()]):
                module.backend = own.product(*weights.values())
            for name, part in parts.items():
                if not module.backend:
                    part.backend = own.product(weights[name])
                if module.backend or part.backend:
                    del part.weight
                else:
                    kept[name] = plain(weights[name])
                reader.done(name, copied=name not in kept)

        todo = matrices(model)
        if plan.embeddings and text:
            todo.append((text.tok_embeddings, {EMBEDDINGS: text.tok_embeddings}))
        for module, parts in reversed(todo):  # largest first, because they take the most memory to build
            if text and module is text.output and reader.tied and plan.embeddings:
                module.backend = text.tok_embeddings.backend
                del module.weight
            else:
                fill(module, parts)
        filled = {name for _, parts in todo for name in parts}
        for name in reader.parts.keys() - filled:
            # A mapped tensor keeps its whole file mapped, so copy it, unless others stay mapped too.
            kept[name] = plain(read(name)).to(dtype, copy=bool(plan.plain or plan.quantized))
            reader.done(name, copied=True)
    model.load_state_dict(kept, strict=True, assign=True)
    if text and reader.tied and OUTPUT in kept:
        text.output.weight = text.tok_embeddings.weight
    for module, parts in todo:
        if plan.joins and isinstance(module, Joined) and parts.keys() <= kept.keys():
            module.join()
    if text:
        text.least_rows = plan.least_rows
        if plan.step:
            text.step_backend = plan.step(text)
    for attention in model.modules():
        if isinstance(attention, ImageAttention):
            attention.kernel = plan.attend
    source.release()
