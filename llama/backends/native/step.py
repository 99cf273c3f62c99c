"""The binding of step.cpp: matrices laid out for it, and the step that replaces `Transformer`'s own."""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.backends.native.compiler import Layer, Matrix, Model, Row, UnavailableError, library
from llama.model import Row as ModelRow
from llama.model import Transformer
from llama.parallel import Linear

GROUP = 32  # inputs that share a scale
KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT5, INT4 = 2, 3, 4
LINEARS = {
    "attention": ("wq", "wk", "wv", "wo"),
    "feed_forward": ("w1", "w2", "w3"),
}


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (rows, cols) as step.cpp reads it, and the memory that it lies in."""

    kind: int
    rows: int
    cols: int
    weight: Tensor
    scale: Tensor | None = None
    min: Tensor | None = None
    tiled: bool = True

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.weight, self.scale, self.min) if part is not None)

    def structure(self) -> Matrix:
        parts = (None if part is None else part.data_ptr() for part in (self.weight, self.scale, self.min))
        return Matrix(self.kind, self.rows, self.cols, self.tiled, *parts)


def pack(weight: Tensor, *, in_place: bool = False, target: str | None = None) -> PackedMatrix:
    """A plain matrix, bf16 or fp32 (out, in), in tiles, or in_place: as it lies, which is slower to read."""
    kind, (rows, cols) = KINDS[weight.dtype], weight.shape
    if in_place:
        return PackedMatrix(kind, rows, cols, weight.contiguous(), tiled=False)
    return PackedMatrix(kind, rows, cols, _tiles(kind, weight.contiguous(), target))


def pack_groups(
    values: Tensor, scales: Tensor, mins: Tensor | None = None, *, bits: int = 8, target: str | None = None
) -> PackedMatrix:
    """A quantized matrix in tiles: scales · values + mins, in groups of 32 inputs.

    values: (out, in) int8 for 8 bits, else uint8 below 2^bits.
    scales, mins: fp16 (out, in / 32). mins: of 4 and 5 bits; None for -scales · 2^(bits - 1).
    bits: 8, 5 or 4.
    """
    rows, cols = values.shape
    kind = {8: INT8, 5: INT5, 4: INT4}[bits]
    weight = _tiles(kind, values.contiguous(), target)
    low = None if mins is None else _tiled_scales(mins, target)
    return PackedMatrix(kind, rows, cols, weight, _tiled_scales(scales, target), low)


def _tiles(kind: int, values: Tensor, target: str | None) -> Tensor:
    lib, (rows, cols) = library(target), values.shape
    tiles = -(-rows // lib.llama_lanes())
    packed = torch.empty(tiles * lib.llama_tile_bytes(kind, cols), dtype=torch.uint8)
    threads = torch.get_num_threads()
    lib.llama_pack(kind, values.data_ptr(), rows, cols, packed.data_ptr(), threads)
    return packed


def _tiled_scales(scales: Tensor, target: str | None) -> Tensor:
    lib, scales = library(target), scales.contiguous()
    rows, groups = scales.shape
    lanes = lib.llama_lanes()
    packed = torch.empty(-(-rows // lanes) * lanes * groups, dtype=torch.float16)
    lib.llama_pack_scales(scales.data_ptr(), rows, groups, packed.data_ptr(), torch.get_num_threads())
    return packed


def check(model: Transformer, target: str | None = None) -> None:
    """Raise UnavailableError, saying why, for a model that has no native step here."""
    if model.device.type != "cpu":
        raise UnavailableError(f"it is for CPUs, and this model is on {model.device}")
    if model.parallel.size > 1:
        raise UnavailableError(f"it runs on one rank, and this model has {model.parallel.size}")
    args, lanes = model.params, library(target).llama_lanes()
    if model.dtype not in KINDS:
        raise UnavailableError(f"it computes in bfloat16 and float32, not {str(model.dtype)[6:]}")
    sizes = {
        "dim": args.dim,
        "hidden_dim": args.hidden_dim,
        "n_heads * head_dim": args.n_heads * args.head_dim,
    }
    for name, size in sizes.items():
        if size % GROUP:
            raise UnavailableError(f"{name}={size} is no multiple of {GROUP}")
    if args.head_dim % lanes:
        raise UnavailableError(f"head_dim={args.head_dim} is no multiple of {lanes}")


class NativeStep:
    """All layers of a model in one call, for any rows; results never depend on what else a step holds.

    model: gives shapes, norms and cache. matrices: of each linear and of tok_embeddings, by name.
    threads: by default as many as PyTorch uses. target: see `library`.
    """

    def __init__(
        self,
        model: Transformer,
        matrices: Mapping[str, PackedMatrix],
        threads: int | None = None,
        target: str | None = None,
    ) -> None:
        self.library, self.matrices, args = library(target), matrices, model.params
        self.params = args
        self.norms: list[Tensor] = []

        def matrix(name: str) -> Matrix:
            return matrices[name].structure()

        def norm(name: str) -> int:
            self.norms.append(model.get_parameter(f"{name}.weight").detach().float().contiguous())
            return self.norms[-1].data_ptr()

        layers = (Layer * args.n_layers)()
        for i, layer in enumerate(layers):
            for part, names in LINEARS.items():
                for name in names:
                    setattr(layer, name, matrix(f"layers.{i}.{part}.{name}"))
            for name in ("attention_norm", "ffn_norm"):
                setattr(layer, name, norm(f"layers.{i}.{name}"))
        shape = (
            args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.head_dim, args.hidden_dim,
            args.vocab_size, args.max_batch_size, args.max_seq_len, KINDS[model.dtype], args.norm_eps,
        )  # fmt: skip
        structure = Model(*shape, layers, matrix("tok_embeddings"), matrix("output"), norm("norm"))
        self._layers = layers  # to which the runtime's copy of the structure points
        self._runtime = self.library.llama_new(ctypes.byref(structure), threads or torch.get_num_threads())
        weakref.finalize(self, self.library.llama_free, self._runtime)

    def hidden(self, tokens: Tensor, rows: Sequence[ModelRow], cache: Tensor, rotations: Tensor) -> Tensor:
        """As `Transformer.hidden`, in fp32. Raises IndexError for a token outside the vocabulary."""
        tokens = tokens.to(torch.int32).contiguous()
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.params.vocab_size:
            raise IndexError(f"token ids must be from 0 to {self.params.vocab_size - 1}")
        used = sum(row.length for row in rows)
        if used > len(tokens):
            raise ValueError(f"the rows want {used} tokens, and there are {len(tokens)}")
        out = torch.empty(len(tokens), self.params.dim)
        out[used:] = 0  # of padding
        self.library.llama_hidden(
            self._runtime,
            tokens.data_ptr(),
            (Row * len(rows))(*(Row(*row) for row in rows)),
            len(rows),
            rotations.data_ptr(),
            cache.data_ptr(),
            out.data_ptr(),
        )
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Transformer.logits`: fp32 (N, dim) to (N, vocab_size)."""
        hidden = hidden.float().contiguous()
        out = torch.empty(len(hidden), self.params.vocab_size)
        self.library.llama_logits(self._runtime, hidden.data_ptr(), len(hidden), out.data_ptr())
        return out


def native_step(
    model: Transformer, threads: int | None = None, *, in_place: bool = False, target: str | None = None
) -> NativeStep:
    """The native step of a loaded model with plain weights, which it takes over: they are laid out anew,
    one after the other, and each is given up as its copy stands, so the model has no state dict afterwards.

    in_place: leave the weights where they lie, in files that are larger than the memory.
    Raises UnavailableError, before it changes anything, for a model that has no native step here.
    """
    check(model, target)
    packed: dict[str, PackedMatrix] = {}
    embeddings = model.tok_embeddings.weight
    tied = model.output.weight.data_ptr() == embeddings.data_ptr()
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            packed[name] = pack(module.weight, in_place=in_place, target=target)
            del module.weight
    packed["tok_embeddings"] = packed["output"] if tied else pack(embeddings, in_place=True)
    if tied:
        del embeddings, model.tok_embeddings.weight
    return NativeStep(model, packed, threads, target)
