"""The binding to step.cpp: matrices laid out for it, and the step that replaces `Transformer`'s own."""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.backends.native import compiler
from llama.backends.native.compiler import Layer, Matrix, Model, Row, UnavailableError, library
from llama.model import Row as ModelRow
from llama.model import Transformer
from llama.noise import key_of
from llama.quantization import GROUP, QuantizedMatrix
from llama.sampling_params import Draw
from llama.vision import Padding, Sight, VisionTransformer, attend

PLAIN_KINDS = {torch.float32: 0, torch.bfloat16: 1}
GROUPED_KINDS = {8: 2, 5: 3, 4: 4}  # by bits
# A layer's fields, and the names of their weights.
FEED_FORWARD = {name: f"feed_forward.{name}" for name in ("w1", "w2", "w3")}
LINEARS = {name: f"attention.{name}" for name in ("wq", "wk", "wv", "wo")} | FEED_FORWARD
CROSS_LINEARS = {name: f"attention.{name}" for name in ("wq", "wo")} | FEED_FORWARD
NORMS = {name: f"{name}.weight" for name in ("attention_norm", "ffn_norm")}
CROSS_SMALL = {
    **NORMS,
    "q_norm": "attention.q_norm.weight",
    "gate_attn": "gate_attn",
    "gate_ffwd": "gate_ffwd",
}


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix (rows, cols) as step.cpp reads it; also a `Product`, for running single layers."""

    kind: int
    rows: int
    cols: int
    weight: Tensor
    scale: Tensor | None = None
    min: Tensor | None = None
    tiled: bool = True
    target: str | None = None
    parts: int = 1  # of the activations in 8 bits; see `in_two_parts`

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.weight, self.scale, self.min) if part is not None)

    def structure(self) -> Matrix:
        parts = (None if part is None else part.data_ptr() for part in (self.weight, self.scale, self.min))
        return Matrix(self.kind, self.rows, self.cols, self.tiled, *parts, self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.cols).float().contiguous()
        out, threads = torch.empty(len(rows), self.rows), torch.get_num_threads()
        matrix = ctypes.byref(self.structure())
        library(self.target).llama_multiply(matrix, rows.data_ptr(), len(rows), out.data_ptr(), threads)
        return out.view(*x.shape[:-1], self.rows).to(x.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the matrix, fp32 (…, cols). Raises IndexError for a row that does not exist."""
        ids, out = checked(tokens.flatten().tolist(), self.rows), torch.empty(*tokens.shape, self.cols)
        library(self.target).llama_rows(ctypes.byref(self.structure()), ids, len(ids), out.data_ptr())
        return out

    def widen(self) -> Tensor:
        """All of a quantized matrix, in fp32."""
        out, threads = torch.empty(self.rows, self.cols), torch.get_num_threads()
        library(self.target).llama_widen(ctypes.byref(self.structure()), out.data_ptr(), threads)
        return out


class Widened:
    """x Wᵀ for a quantized weight, (…, in) to (…, out), for thousands of rows: it is widened each time."""

    def __init__(self, weight: QuantizedMatrix) -> None:
        self.packed = pack_quantized(weight)
        self.nbytes = self.packed.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.widen().to(x.dtype))


def pack(weight: Tensor, *, in_place: bool = False, target: str | None = None) -> PackedMatrix:
    """A plain matrix, bf16 or fp32 (out, in), in tiles; in_place: unchanged, which is slower to read.

    target: see `library`.
    """
    kind, (rows, cols) = PLAIN_KINDS[weight.dtype], weight.shape
    if in_place:
        return PackedMatrix(kind, rows, cols, weight.contiguous(), tiled=False, target=target)
    return PackedMatrix(kind, rows, cols, _tiles(kind, weight, cols, target), target=target)


def pack_quantized(weight: QuantizedMatrix, *, target: str | None = None, parts: int = 1) -> PackedMatrix:
    """A quantized matrix in tiles. target: see `library`. parts: of activations, if it has 8 bits."""
    kind, (rows, cols) = GROUPED_KINDS[weight.bits], weight.shape
    scales, mins = (None if x is None else _tiled_scales(x, target) for x in (weight.scales, weight.mins))
    packed = _tiles(kind, weight.values, cols, target)
    parts = parts if weight.bits == 8 else 1
    return PackedMatrix(kind, rows, cols, packed, scales, mins, target=target, parts=parts)


def attend_image(qkv: Tensor, padding: Padding) -> Tensor:
    """Like `vision.attend`, and faster in bf16 on a CPU with AMX. Raises UnavailableError like `library`."""
    n, _, heads, head_dim = qkv.shape
    if qkv.dtype != torch.bfloat16 or head_dim % 16 or not heads or not library().llama_sees():
        return attend(qkv, padding)
    out, threads = qkv.new_empty(n, heads * head_dim), torch.get_num_threads()
    bias = None if padding.bias is None else padding.bias.float()
    pointers = qkv.contiguous(), bias, out
    qkv_at, bias_at, out_at = (None if tensor is None else tensor.data_ptr() for tensor in pointers)
    library().llama_attend_image(qkv_at, n, heads, head_dim, padding.valid, bias_at, out_at, threads)
    return out


def checked(ids: Sequence[int], vocab_size: int) -> ctypes.Array[ctypes.c_int32]:
    """Token ids for the library. Raises IndexError for one that does not exist."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise IndexError(f"token ids must be from 0 to {vocab_size - 1}")
    return (ctypes.c_int32 * len(ids))(*ids)


def _tiles(kind: int, values: Tensor, cols: int, target: str | None) -> Tensor:
    """values: (rows, …), read in place, possibly from a mapped file."""
    if values.stride(-1) != 1:
        values = values.contiguous()
    lib, rows = library(target), len(values)
    packed = torch.empty(-(-rows // lib.llama_lanes()) * lib.llama_tile_bytes(kind, cols), dtype=torch.uint8)
    row, group = values.stride(0) * values.itemsize, values.stride(1) * values.itemsize
    threads = torch.get_num_threads()
    lib.llama_pack(kind, values.data_ptr(), row, group, rows, cols, packed.data_ptr(), threads)
    return packed


def _tiled_scales(scales: Tensor, target: str | None) -> Tensor:
    lib, (rows, groups) = library(target), scales.shape
    packed = torch.empty(-(-rows // lib.llama_lanes()) * lib.llama_lanes() * groups, dtype=torch.float16)
    strides = (stride * scales.itemsize for stride in scales.stride())
    threads = torch.get_num_threads()
    lib.llama_pack_scales(scales.data_ptr(), *strides, rows, groups, packed.data_ptr(), threads)
    return packed


def check(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UnavailableError, saying why, if a model has no native step for a device and dtype."""
    if device.type != "cpu":
        raise UnavailableError(f"it is for CPUs, but this model is on {device.type}")
    if model.parallel.size > 1:
        raise UnavailableError(f"it runs on one rank, but this model has {model.parallel.size}")
    if dtype not in PLAIN_KINDS:
        raise UnavailableError(f"it computes in bfloat16 and float32, not {str(dtype)[6:]}")
    args, lanes = model.params, library().llama_lanes()
    sizes = {
        "dim": args.dim,
        "hidden_dim": args.hidden_dim,
        "n_heads · head_dim": args.n_heads * args.head_dim,
    }
    for name, size in sizes.items():
        if size % GROUP:
            raise UnavailableError(f"{name}={size} is not a multiple of {GROUP}")
    if args.head_dim % lanes:
        raise UnavailableError(f"head_dim={args.head_dim} is not a multiple of {lanes}")


SENSITIVE = ("wq", "wk", "wv", "output", "tok_embeddings")  # see `in_two_parts`; the last two may be one


def is_sensitive(name: str) -> bool:
    """Whether a matrix, by its weight's name, loses much if activations have 8 bits."""
    return name.split(".")[-2] in SENSITIVE


def in_two_parts(matrices: Sequence[Matrix]) -> None:
    """Have int8 matrices, which multiply the same activations, take them in two parts.

    The second part is what rounding to the first has left. In 8 bits, activations would lose more than int8
    weights do, most of it here; and these matrices are a small share of a model's.
    """
    if all(matrix.kind == GROUPED_KINDS[8] for matrix in matrices):
        for matrix in matrices:
            matrix.parts = 2


class NativeStep:
    """All layers of a model in one call, for any rows; results never depend on the step's other rows.

    model: its matrices and embeddings must be `PackedMatrix`.
    threads: by default as many as PyTorch uses.
    target: the one that the matrices were packed for; see `library`.
    """

    def __init__(self, model: Transformer, threads: int | None = None, target: str | None = None) -> None:
        self.library, self.params = library(target), model.params
        args, self._kept = model.params, list[object]()  # objects that the runtime's structures point to

        def matrix(name: str) -> Matrix:
            packed = model.get_submodule(name).backend
            if not isinstance(packed, PackedMatrix):
                raise TypeError(f"{name} is not packed for the compiled step")
            self._kept.append(packed)
            return packed.structure()

        # Modules with a small weight that may be edited, its name, and an fp32 copy.
        self._small: list[tuple[nn.Module, str, Tensor]] = []

        def small(name: str) -> int:
            parent, _, last = name.rpartition(".")
            module = model.get_submodule(parent)
            copy = getattr(module, last).detach().to(torch.float32, copy=True).contiguous()
            self._small.append((module, last, copy))
            return copy.data_ptr()

        def layers(folder: str, count: int, linears: Mapping[str, str], smalls: Mapping[str, str]) -> Any:
            """The structures of some layers; by field, the names of matrices and of small weights."""
            found = (Layer * count)()
            self._kept.append(found)
            for i, layer in enumerate(found):
                for field, name in linears.items():
                    setattr(layer, field, matrix(f"{folder}.{i}.{name}"))
                in_two_parts([getattr(layer, field) for field in linears if field in SENSITIVE])
                for field, name in smalls.items():
                    setattr(layer, field, small(f"{folder}.{i}.{name}"))
            return found

        sizes = (
            args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.head_dim, args.hidden_dim,
            args.vocab_size, args.max_batch_size, args.max_seq_len, PLAIN_KINDS[model.dtype],
        )  # fmt: skip
        own = layers("layers", args.n_layers, LINEARS, NORMS)
        ends = matrix("tok_embeddings"), matrix("output"), small("norm.weight")
        in_two_parts([ends[1]])
        structure = Model(*sizes, args.norm_eps, own, *ends)
        self.tokens = args.vocab_size  # how many ids there are
        if isinstance(model, VisionTransformer):
            fusion = model.params.fusion
            structure.n_cross, structure.image_positions = len(fusion), model.image_cache_shape()[-2]
            structure.cross = layers("cross_attention_layers", len(fusion), CROSS_LINEARS, CROSS_SMALL)
            structure.fusion = (ctypes.c_int32 * len(fusion))(*fusion)
            structure.added_embeddings = small("learnable_embedding.weight")
            self.tokens += len(model.learnable_embedding.weight)
            self._kept.append(structure.fusion)
        self._runtime = self.library.llama_new(ctypes.byref(structure), threads or torch.get_num_threads())
        weakref.finalize(self, self.library.llama_free, self._runtime)
        self._copied = self._versions()

    def _look_at_weights(self, rows: Sequence[ModelRow]) -> None:
        """Copy small weights that were edited, if one of the rows begins or goes on with a prompt."""
        reads = any(row.length > 1 or row.start == 0 for row in rows)
        if reads and (versions := self._versions()) != self._copied:
            with torch.inference_mode():
                for module, name, copy in self._small:
                    copy.copy_(getattr(module, name))
            self._copied = versions

    def _versions(self) -> list[tuple[int, int]]:
        """Numbers that change when a small weight is edited; looked at when a prompt is read."""
        weights = [getattr(module, name) for module, name, _ in self._small]
        return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]

    def hidden(
        self,
        tokens: Tensor,
        rows: Sequence[ModelRow],
        cache: Tensor,
        rotations: Tensor,
        sights: Sequence[Sight] = (),
        images: Tensor | None = None,
    ) -> Tensor:
        """Like `Transformer.hidden`, in fp32. Raises IndexError for a token outside the vocabulary.

        sights: what tokens see of images, the cache in `VisionTransformer`; by default, nothing.
        """
        self._look_at_weights(rows)
        ids = checked(tokens.flatten().tolist(), self.tokens)
        used = sum(row.length for row in rows)
        if used > len(tokens):
            raise ValueError(f"the rows need {used} tokens, but there are {len(tokens)}")
        out = torch.empty(len(tokens), self.params.dim)
        if used < len(tokens):
            out[used:] = 0  # padding
        seen = [
            compiler.Sight(
                sight.tokens.start,
                sight.tokens.stop - sight.tokens.start,
                sight.slot,
                sight.seen.start,
                sight.seen.stop,
            )
            for sight in sights
        ]
        self.library.llama_hidden(
            self._runtime,
            ids,
            _rows(rows),
            len(rows),
            rotations.data_ptr(),
            cache.data_ptr(),
            (compiler.Sight * len(seen))(*seen),
            len(seen),
            None if images is None else images.data_ptr(),
            out.data_ptr(),
        )
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Like `Transformer.logits`: fp32 (N, dim) to (N, vocab_size)."""
        hidden = hidden.float().contiguous()
        out = torch.empty(len(hidden), self.params.vocab_size)
        self.library.llama_logits(self._runtime, hidden.data_ptr(), len(hidden), out.data_ptr())
        return out

    def choose(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Like `sampling.choose`: int64 (N) from fp32 logits (N, vocab_size)."""
        out, logits = torch.empty(len(logits), dtype=torch.long), logits.contiguous()
        how = self._draws(draws)
        self.library.llama_choose(self._runtime, logits.data_ptr(), len(logits), how, out.data_ptr())
        return out

    def next_tokens(
        self,
        ids: list[int],
        rows: Sequence[ModelRow],
        draws: Sequence[Draw],
        cache: Tensor,
        rotations: Tensor,
    ) -> list[int]:
        """`hidden` of text, `logits` after each row, and `choose`, in one call."""
        self._look_at_weights(rows)
        out, tokens = (ctypes.c_int64 * len(rows))(), checked(ids, self.tokens)
        where = _rows(rows), len(rows), rotations.data_ptr(), cache.data_ptr()
        self.library.llama_next(self._runtime, tokens, *where, self._draws(draws), out)
        return list(out)

    def _draws(self, draws: Sequence[Draw]) -> ctypes.Array[compiler.Draw]:
        vocab_size, rows = self.params.vocab_size, (compiler.Draw * len(draws))()
        for row, (params, n) in zip(rows, draws, strict=True):
            row.temperature = params.divisor
            if params.divisor:
                row.key, row.top_k = key_of(params.seed, n), min(params.top_k or vocab_size, vocab_size)
                row.top_p, row.min_p = params.top_p, params.min_p
        return rows


def _rows(rows: Sequence[ModelRow]) -> ctypes.Array[Row]:
    return (Row * len(rows))(*(Row(*row) for row in rows))
