"""From a checkpoint to a model that is ready: does it fit, load, choose the backend, warm up."""

import math
import sys
import time
from collections.abc import Callable

import torch

from llama.backends.onednn import pack
from llama.backends.torchao import check_torchao, float8, from_stored
from llama.checkpoint.quantized import QuantizedShards
from llama.checkpoint.reader import RankReader, load_weights
from llama.checkpoint.source import Checkpoint, TensorSource
from llama.device import gigabytes, total_memory
from llama.engine import Engine
from llama.engine.static import compile_blocks
from llama.errors import ArgumentError, OutOfMemoryError
from llama.model import ModelArgs, Transformer
from llama.parallel import ModelParallel, matrices
from llama.quantization import (
    SCHEMES,
    Quantizer,
    Stored,
    backend,
    dequantized,
    four_bits,
    int8_rows,
    weight_bytes,
)
from llama.sampling import SamplingParams
from llama.vision import VisionModel, VisionTransformer, make_model

# Prefixes of the tensors of a vision model that only images need: the encoder, and all of them.
TOWER = "vision_model."
VISION = (TOWER, "cross_attention_layers.", "learnable_embedding.")


def load(
    checkpoint: Checkpoint,
    args: ModelArgs,
    group: ModelParallel,
    device: torch.device,
    dtype: torch.dtype,
    scheme: str | None = None,
) -> Transformer:
    """This rank's part of a checkpoint's model, cache allocated.

    Tells on stderr of rank 0 what it does. Raises what `Llama.build` raises.
    """
    start = time.perf_counter()
    with torch.device("meta"):
        model = make_model(args, group)
    resident = weight_bytes(model, dtype, scheme)
    cache = math.prod(model.cache_shape()) * dtype.itemsize
    sequences = f"max_batch_size={args.max_batch_size}, max_seq_len={args.max_seq_len}"
    skip: tuple[str, ...] = ()
    if isinstance(model, VisionTransformer):
        cache += math.prod(model.image_cache_shape()) * dtype.itemsize
        sequences += f", max_images={model.params.max_images}"
        defer_tower(model, checkpoint.weights, scheme, dtype, device)
        skip = (TOWER,)
    elif "vision_chunk_size" in checkpoint.params:
        skip = VISION
    memory = total_memory(device)
    if memory is not None and resident + cache > memory:
        raise OutOfMemoryError(
            f"weights of {gigabytes(resident)} and a KV cache of {gigabytes(cache)} ({sequences}) do not "
            f"fit into the {gigabytes(memory)} of {device}: lower max_seq_len or max_batch_size, "
            "or use more ranks"
        )

    def say(text: str) -> None:
        if group.rank == 0:
            print(text, file=sys.stderr)

    if checkpoint.context is not None and args.max_seq_len > checkpoint.context:
        say(
            f"warning: max_seq_len={args.max_seq_len} is more than the {checkpoint.context} tokens that this "
            f"{checkpoint.family} model was trained for; answers beyond them degrade"
        )
    if scheme is None:
        load_weights(model, checkpoint.weights, dtype, device, skip=skip)
        weights = sum(weight.nbytes for weight in model.parameters())  # fewer where embeddings are tied
        pack(model)
    else:
        load_quantized(model, checkpoint.weights, scheme, dtype, device, skip=skip)
        weights = resident
    share = f", {group.size} ranks" if group.size > 1 else ""
    say(
        f"Loaded {checkpoint.path.resolve().name}: {checkpoint.files} file(s), {gigabytes(weights)} "
        f"in {scheme or str(dtype)[6:]} on {device}{share}, {time.perf_counter() - start:.1f} s"
    )
    say(f"KV cache: {gigabytes(cache)} for {sequences}")
    model.allocate_cache()
    return model


def defer_tower(
    model: VisionTransformer,
    source: TensorSource,
    scheme: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Let a vision model load its image encoder with the first image, and not before."""
    tower = model.vision_model
    del model.vision_model

    @torch.inference_mode(False)
    def load_tower() -> None:
        with model.parallel.together():
            if scheme is None:
                load_weights(tower, source, dtype, device, prefix=TOWER)
                pack(tower)
            else:
                load_quantized(tower, source, scheme, dtype, device, prefix=TOWER)
        source.release()
        model.vision_model = tower

    model.load_tower = load_tower


def warm_up(engine: Engine, required: bool) -> None:
    """Compile the model's blocks and let the engine decode a little, so that nobody waits for it later.

    Where that fails the model stays as it is, with a word; where it is required, RuntimeError.
    """
    start = time.perf_counter()
    model = engine.model
    compile_blocks(model)
    prompt = [0] * min(5, model.params.max_seq_len - 1)
    try:
        for count in sorted({1, model.params.max_batch_size}):  # one row has kernels of its own
            for _ in engine.run([engine.add(prompt, SamplingParams(max_tokens=3)) for _ in range(count)]):
                pass
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        engine.close()
        if required or model.parallel.size > 1:
            raise RuntimeError(f"compiling failed, build with compile=False: {reason}") from error
        print(f"Compilation failed, continuing without it: {reason}", file=sys.stderr)
        for module in model.modules():
            module._compiled_call_impl = None
    engine.forget()  # nothing in the cache is worth reusing
    if engine.static and model.parallel.rank == 0:
        print(f"Compiled: {time.perf_counter() - start:.1f} s", file=sys.stderr)


def check_quantize(scheme: str | None, device: torch.device) -> None:
    """Raise ValueError for a scheme that there is not, or that the device has not.

    ImportError where a package lacks that it needs.
    """
    if scheme is None:
        return
    if scheme not in SCHEMES:
        raise ArgumentError(f"quantize must be None, 'int8', 'int4' or 'fp8', not {scheme!r}")
    if device.type == "cuda":
        check_torchao(scheme, device)
    elif scheme == "fp8":
        raise ArgumentError(
            f"quantize='fp8' runs on CUDA devices only, not on this {device.type} device: "
            "'int8' and 'int4' run on x86 CPUs too"
        )
    elif device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ArgumentError(
            f"quantize={scheme!r} runs on x86 CPUs and CUDA devices only, not on this {device.type} device: "
            "leave it out (a folder of quantized weights needs the one it was made from), "
            "or pass device='cpu' on x86"
        )


def scheme_of(checkpoint: Checkpoint, scheme: str | None) -> str | None:
    """The scheme that a checkpoint's weights are stored in, else the one asked for.

    Raises ValueError where another one is asked for than they are stored in.
    """
    stored = checkpoint.quantization
    if stored is not None and scheme not in (None, stored):
        raise ArgumentError(
            f"{checkpoint.path} holds {stored} weights, which quantize={scheme!r} cannot be made of: "
            "leave it out, or name the folder that they were made from"
        )
    return stored or scheme


def load_quantized(
    model: Transformer | VisionModel,
    source: TensorSource,
    scheme: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prefix: str = "",
    skip: tuple[str, ...] = (),
) -> None:
    """Fill a model that was built on the meta device; of its linears only quantized weights are ever held.

    One matrix after the other is read and quantized, or read as a folder of quantized weights has it.
    dtype: of embeddings and norms, and what CUDA computes in. Raises what `load_weights` raises.
    """
    linears = {name for _, _, parts in matrices(model) for name in parts}
    # Mapped files are let go of often: what was read of them would look like memory in use.
    with RankReader(model, source, 2**28, prefix=prefix, skip=skip) as reader:
        turns = scheme == "int8" and device.type == "cpu" and isinstance(model, Transformer)
        quantizer = Quantizer(scheme, model.params.dim, source.read, turns)
        kept = {}
        for name in [name for name in reader.parts if name not in linears]:
            weight = reader.read(name)
            new = weight if isinstance(source, QuantizedShards) else quantizer.other(name, weight)
            # A copy, because a row that is mapped keeps its whole file so.
            kept[name] = new.to(device, dtype, copy=new is weight)
            reader.done(weight.numel(), weight.nbytes)
            del weight, new

        def stored(name: str, four: bool) -> Stored:
            if isinstance(source, QuantizedShards):
                found = _stored_part(reader, source, name)
                if found is None or (len(found) == 3 and not four):
                    # The operator's sizes, or borders of groups, are not those of this rank's part.
                    found = int8_rows(reader.read(name))
                size = sum(tensor.nbytes for tensor in found)
                found = tuple(tensor.to(device) for tensor in found)
            else:
                weight = reader.read(name)
                size = weight.nbytes
                found = quantizer.matrix(name, weight.to(device), four)
            reader.done(model.get_parameter(name).numel(), size)
            return found

        if scheme == "fp8":
            for _, module, parts in matrices(model):
                module.backend = float8(torch.cat([reader.read(part).to(device) for part in parts]))
                for part in parts.values():
                    reader.done(part.weight.numel(), part.weight.numel() * source.dtype.itemsize)
                    del part.weight
        else:
            _replace(model, scheme, stored, None if device.type == "cpu" else dtype)
    model.load_state_dict(kept, strict=True, assign=True)
    source.release()


def _stored_part(reader: RankReader, source: QuantizedShards, name: str) -> Stored | None:
    """What a folder of quantized weights has of this rank's part; None where a border cuts a group."""
    part = reader.parts[name]
    assert part.dim is not None
    pieces = [source.stored(reader.prefix + name, part.dim, span) for span in part.spans]
    whole = [piece for piece in pieces if piece is not None]
    if len(whole) < len(pieces):
        return None
    if len(whole) == 1:
        return tuple(tensor.contiguous() for tensor in whole[0])
    if part.dim == 1 and len(whole[0]) == 2:  # scales of rows are the same for all columns
        return torch.cat([weight for weight, _ in whole], 1), whole[0][1]
    return tuple(torch.cat(tensors, part.dim) for tensors in zip(*whole, strict=True))


def quantize(model: Transformer, scheme: str) -> None:
    """Quantize every linear of a loaded model, one after the other; it has no state dict afterwards."""
    quantizer = Quantizer(scheme, model.params.dim, model.get_parameter)
    _replace(model, scheme, lambda name, four: quantizer.matrix(name, model.get_parameter(name), four))
    changed = {name: quantizer.other(name, weight) for name, weight in model.named_parameters()}
    model.load_state_dict(changed, strict=True, assign=True)


def _replace(
    model: torch.nn.Module,
    scheme: str,
    read: Callable[[str, bool], Stored],
    dtype: torch.dtype | None = None,
) -> None:
    """Give every linear of a model the backend of its stored weight, and take its plain one away.

    read: what is stored of a linear, by its name and whether 4 bits may be. dtype: of results on CUDA,
    None on a CPU.
    """
    four = four_bits(model, scheme)
    # The output layer, which takes most memory to make, comes first, while there is most left.
    for name, module, parts in reversed(matrices(model)):
        stored = [read(part, part in four) for part in parts]
        if len({len(tensors) for tensors in stored}) > 1:
            stored = [int8_rows(dequantized(tensors)) if len(tensors) == 3 else tensors for tensors in stored]
        whole = stored[0] if len(stored) == 1 else tuple(map(torch.cat, zip(*stored, strict=True)))
        del stored
        module.backend = backend(name, whole) if dtype is None else from_stored(whole, dtype)
        for linear in parts.values():
            del linear.weight
