"""GGUF files of the `llama` architecture, read in place with the `gguf` package.

GGUF stores this architecture's query and key channels in native order already, so reading a file only
takes renaming, decoding quantized blocks, and converting the tokenizer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.gguf_tokenizer import GGUFError, read_formatter, read_tokenizer
from llama.checkpoint.params import checked, feed_forward
from llama.checkpoint.source import Checkpoint, check_shapes, whole_parts
from llama.errors import MissingPackageError, shown
from llama.files import check_kinds
from llama.model import ModelArgs, rope_frequencies
from llama.parallel import Span
from llama.quantization import GROUP, QuantizedMatrix, pack, spread
from llama.quantizer import quantize
from llama.tokenizer import load_tokenizer

NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
# Types of the fields that are read from a file.
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("general.architecture", "general.name", "llama.rope.scaling.type"), (str,)),
    **dict.fromkeys(("tokenizer.chat_template", "tokenizer.ggml.model", "tokenizer.ggml.pre"), (str,)),
    **{f"llama.{name}_length": (int,) for name in ("embedding", "feed_forward", "context")},
    **{f"llama.attention.{name}": (int,) for name in ("head_count", "head_count_kv")},
    **{f"llama.attention.{name}_length": (int,) for name in ("key", "value")},
    **dict.fromkeys(("llama.block_count", "llama.rope.dimension_count", "split.count"), (int,)),
    **dict.fromkeys(("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"), (float,)),
    **{
        f"tokenizer.ggml.{name}_token_id": (int,)
        for name in ("bos", "eos", "eot", "eom", "padding", "unknown")
    },
    **{f"tokenizer.ggml.{name}": (list,) for name in ("tokens", "token_type", "scores", "merges")},
    **{f"tokenizer.ggml.{name}": (bool,) for name in ("add_bos_token", "add_space_prefix")},
    "tokenizer.ggml.remove_extra_whitespaces": (bool,),
}


def open_gguf(path: Path, tokenizer_path: Path | None = None) -> Checkpoint:
    """The model in a GGUF file, read in place.

    tokenizer_path: a tokenizer other than the file's own.
    Raises FileNotFoundError if there is no file, ImportError if the gguf package is missing, GGUFError
    if the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: pass the path of a GGUF file")
    reader, fields = read(path)
    if (parts := fields.get("split.count", 1)) > 1:
        raise GGUFError(
            f"{path} is one of {parts} parts of a model; merge them first (llama-gguf-split --merge)"
        )
    params = read_params(path, fields, {tensor.name: tensor for tensor in reader.tensors})
    weights = GGUFWeights(path, reader.tensors, ModelArgs(**params))
    tokenizer = read_tokenizer(path, fields) if tokenizer_path is None else load_tokenizer(tokenizer_path)
    return Checkpoint(
        path=path,
        kind="GGUF",
        family=fields.get("general.name") or "Llama architecture",
        params=params,
        weights=weights,
        tokenizer=tokenizer,
        formatter=read_formatter(path, fields, tokenizer),
        context=fields.get("llama.context_length"),
        files=1,
        quantization=weights.kinds,
    )


def read(path: Path) -> tuple[Any, dict[str, Any]]:
    """A `gguf.GGUFReader` and the file's fields, with types checked.

    Raises GGUFError for any other kind of file, MissingPackageError if the gguf package is missing.
    """
    try:
        import gguf
    except ImportError:
        raise MissingPackageError("GGUF files need the gguf package: pip install -e '.[demo]'") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package checks nothing, so numpy may raise anything
        raise GGUFError(f"{path} is not a GGUF file, or is truncated: {error}") from None
    check_kinds(path, fields, FIELDS)
    return reader, fields


class GGUFWeights:
    """The weights of a GGUF file, as a `QuantizedSource`; plain tensors are read as fp32.

    Raises GGUFError if a tensor is missing or unknown, or has the wrong shape or encoding.
    """

    def __init__(self, path: Path, tensors: Sequence[Any], args: ModelArgs) -> None:
        import gguf

        self.path = path
        # Each tensor's location, instead of the reader, which would keep the whole file mapped.
        self._where = {
            native_name(tensor.name): (
                tensor.tensor_type,
                tensor.data.dtype,
                int(tensor.data_offset),
                tensor.data.shape,
                tuple(int(n) for n in reversed(tensor.shape)),
            )
            for tensor in tensors
            if tensor.name != "rope_freqs.weight"  # checked with the parameters
        }
        parts, config = whole_parts(args, self._where), "the file's metadata"
        self.shapes = {name: shape for name, (*_, shape) in self._where.items()}
        check_shapes(path, self.shapes, parts, config)
        for name, (kind, *_) in self._where.items():
            if kind not in DTYPES and kind not in gguf.quants._type_traits:
                raise GGUFError(f"{path}: {name} is {kind.name}, which the gguf package cannot dequantize")
        # bf16 has enough bits for quantized numbers.
        kind = Counter(kind for kind, *_ in self._where.values() if kind != gguf.GGMLQuantizationType.F32)
        common = kind.most_common(1)[0][0] if kind else gguf.GGMLQuantizationType.F32
        self.dtype = DTYPES.get(common, torch.bfloat16)

    @property
    def kinds(self) -> str | None:
        """The matrices' quantization formats as text; None if they are not quantized."""
        kinds = Counter(kind for kind, *_, shape in self._where.values() if len(shape) == 2)
        names = [f"{kind.name}{'' if kind in BLOCKS else ' as int8'}" for kind, _ in kinds.most_common()]
        return ", ".join(names) if any(self.bits(name) for name in self.shapes) else None

    def bits(self, name: str) -> int | None:
        kind, *_, shape = self._where[name]
        return None if kind in DTYPES or len(shape) == 1 else BLOCKS.get(kind, INT8_BLOCK)[0]

    def matrix(self, name: str) -> QuantizedMatrix:
        kind, _, offset, stored_shape, _ = self._where[name]
        if kind not in BLOCKS:
            matrix = quantize(self.read(name), 8)
            assert isinstance(matrix, QuantizedMatrix)
            return matrix
        bits, size, numbers = BLOCKS[kind]
        # Copy-on-write, although nothing is written: PyTorch requires writable memory.
        data: np.ndarray = np.memmap(self.path, np.uint8, "c", offset, stored_shape)
        blocks = torch.from_numpy(data).unflatten(1, (-1, size))
        if size > 2 * GROUP:
            return from_k_blocks(blocks, bits)
        values = blocks[..., 2 * numbers :]
        halves = blocks[..., : 2 * numbers].view(torch.float16).unbind(-1)
        return QuantizedMatrix(values.view(torch.int8) if bits == 8 else values, *halves)

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        import gguf

        kind, dtype, offset, stored_shape, shape = self._where[name]
        data: np.ndarray = np.memmap(self.path, dtype, "r", offset, stored_shape)
        if dim == 0 and span is not None:
            data, shape = data[slice(*span)], (span[1] - span[0], *shape[1:])
        values = torch.from_numpy(np.array(gguf.dequantize(data, kind), np.float32)).view(shape)
        return values if dim == 0 or span is None else values[:, slice(*span)]

    def release(self) -> None:
        """Does nothing: each read maps what it needs."""


DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # by gguf.GGMLQuantizationType
# Blocks that are groups of 32 or are split into such groups: bits, bytes, and leading fp16 numbers. All
# others are read as 8 bits.
BLOCKS = {
    8: (8, 34, 1),  # Q8_0
    2: (4, 18, 1),  # Q4_0
    3: (4, 20, 2),  # Q4_1
    6: (5, 22, 1),  # Q5_0
    7: (5, 24, 2),  # Q5_1
    12: (4, 144, 2),  # Q4_K
    13: (5, 176, 2),  # Q5_K
}
INT8_BLOCK = BLOCKS[8]


def from_k_blocks(blocks: Tensor, bits: int) -> QuantizedMatrix:
    """Groups of 32 from blocks (rows, n, bytes) of Q4_K or Q5_K: 8 groups with 6-bit scales and minima,
    which are multiplied here by the block's two factors."""
    import gguf

    rows = len(blocks)
    blocks = blocks.flatten(0, 1)
    scale, least = blocks[:, :4].view(torch.float16).float().split(1, 1)
    scales, mins = map(torch.from_numpy, gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16].numpy()))
    values = spread(blocks[:, -128:].unflatten(1, (4, GROUP)), 4).flatten(1, 2)  # (blocks, 8 groups, 32)
    if bits == 5:
        values = values | spread(blocks[:, 16:48], 1) << 4
    tensors = pack(values, bits), (scale * scales).half(), (-least * mins).half()
    return QuantizedMatrix(*(tensor.unflatten(0, (rows, -1)).flatten(1, 2) for tensor in tensors))


def native_name(name: str) -> str:
    """blk.0.attn_q.weight to layers.0.attention.wq.weight."""
    match = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.weight", name)
    if not match or match[2] not in NAMES:
        raise GGUFError(f"unexpected tensor {name}: not part of a Llama model")
    return f"{(match[1] or '').replace('blk', 'layers')}{NAMES[match[2]]}.weight"


def read_params(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The `params.json` for a GGUF file. Raises GGUFError if the model is not supported."""
    if (architecture := fields.get("general.architecture")) != "llama":
        raise GGUFError(f"{path}: architecture {shown(architecture)} is not supported; only 'llama' is")
    if fields.get("llama.expert_count"):
        raise GGUFError(f"{path} has llama.expert_count: mixture-of-experts models are not supported")
    try:
        params: dict[str, Any] = {
            "dim": fields["llama.embedding_length"],
            "n_layers": fields["llama.block_count"],
            "n_heads": fields["llama.attention.head_count"],
            "n_kv_heads": fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"]),
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            **feed_forward(path, fields["llama.embedding_length"], fields["llama.feed_forward_length"]),
            # stored as fp32: 9.99999975e-06 means 1e-05
            "norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            "rope_theta": float(f"{fields.get('llama.rope.freq_base', 10000.0):.6g}"),
        }
    except KeyError as error:
        raise GGUFError(f"{path} lacks {error.args[0]}; download it again") from None
    params = checked(path, params)
    head_dim = fields.get("llama.attention.key_length") or params["dim"] // params["n_heads"]
    if head_dim * params["n_heads"] != params["dim"]:
        params["head_dim"] = head_dim
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if fields.get(key, head_dim) != head_dim:
            raise GGUFError(
                f"{path} has {key}={shown(fields[key])}; only {head_dim} is supported for this model"
            )
    if "rope_freqs.weight" in tensors:
        # The divisor of each frequency. The largest is the scaling factor, which must explain the others.
        divisors = torch.from_numpy(np.array(tensors["rope_freqs.weight"].data, np.float32))
        plain = rope_frequencies(ModelArgs(**params))
        params |= {"use_scaled_rope": True, "rope_scaling_factor": float(divisors.max())}
        scaled = rope_frequencies(ModelArgs(**checked(path, params)))
        if divisors.shape != plain.shape or not torch.allclose(plain / divisors, scaled, rtol=1e-4):
            raise GGUFError(f"{path} has rope_freqs that differ from Llama 3.1's, which is not supported")
    elif fields.get("llama.rope.scaling.type", "none") != "none":
        raise GGUFError(
            f"{path} has llama.rope.scaling.type={shown(fields['llama.rope.scaling.type'])}, "
            "which is not supported"
        )
    return checked(path, params)
