"""LoRA adapters in PEFT's format, merged into the weights of any checkpoint as they are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.huggingface import native_name, open_weights, rotary_heads, to_native_rows
from llama.checkpoint.source import TensorSource, is_tied
from llama.errors import CheckpointError
from llama.model import ModelArgs
from llama.parallel import Span
from llama.quantization import OUTPUT
from llama.tokenizer.huggingface import read_json

# What changes the mathematics, and must be absent or have this value.
REQUIRED = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_qalora": False,
    "layer_replication": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


class Adapted:
    """A `TensorSource` with an adapter merged in: W + scale · B A (Hu et al. 2021, section 4.1), in fp32.

    Raises FileNotFoundError where a file of the adapter lacks, CheckpointError where it is of
    another kind, or was trained for another base.
    """

    def __init__(self, base: TensorSource, folder: Path, args: ModelArgs) -> None:
        self.base = base
        self.shapes, self.dtype = base.shapes, base.dtype
        self._replaced, self._deltas = read_adapter(folder, base.shapes, args)

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        if (weight := self._replaced.get(name)) is None:
            weight = self.base.read(name, dim, span)
        elif span is not None:
            weight = weight.narrow(dim, span[0], span[1] - span[0])
        if name not in self._deltas:
            return weight
        b, a = self._deltas[name]
        if span is not None:
            b, a = (b[slice(*span)], a) if dim == 0 else (b, a[:, slice(*span)])
        return weight.float() + b @ a

    def release(self) -> None:
        self.base.release()


def read_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], args: ModelArgs
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """What an adapter does to each tensor, by native name.

    Returns whole tensors that stand for the base's (PEFT saves embeddings that it adapts), and
    factors B (out, r), scale included, and A (r, in), fp32, rows in native order.
    """
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter_config.json in {folder}: is it an adapter in PEFT's format?")
    config = read_json(folder / "adapter_config.json")
    for key, value in REQUIRED.items():
        if config.get(key, value) not in (value, None, []):
            raise CheckpointError(f"the adapter {folder} has {key}={config[key]!r}, which cannot be merged")
    paths = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no adapter_model.safetensors in {folder}: is the download complete?")
    opened = open_weights(path)
    names = list(opened.keys())
    tensors = {name: opened[name] if isinstance(opened, dict) else opened.get_tensor(name) for name in names}
    replaced: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", name)
        if whole := re.fullmatch(
            r"base_model\.model\.(lm_head|model\.embed_tokens)(\.base_layer)?\.weight", name
        ):
            native = native_name(f"{whole[1]}.weight")
            if native is None or tuple(tensor.shape) != shapes.get(native):
                raise CheckpointError(
                    f"{path} has a {whole[1]} of {tuple(tensor.shape)}, which this model's is not: "
                    "is the adapter for another base, or one with tokens added?"
                )
            replaced[native] = tensor
            continue
        if not match:
            raise CheckpointError(f"{path} has {name}, which is not a part of a plain LoRA")
        # Embeddings are looked up by row, so their factors are stored the other way round.
        which = match[3] if not match[2] else "BA"["AB".index(match[3])]
        pairs.setdefault(match[1], {})[which] = tensor.float().T if match[2] else tensor.float()
    deltas = (_delta(path, config, module, pair, shapes, args) for module, pair in pairs.items())
    return replaced, dict(deltas)


def _delta(
    path: Path,
    config: Mapping[str, Any],
    module: str,
    pair: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    args: ModelArgs,
) -> tuple[str, tuple[Tensor, Tensor]]:
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{path} has only one of the two factors of {module}; download it again")
    a, b = pair["A"], pair["B"]
    name = native_name(f"{module}.weight")
    if name == OUTPUT and is_tied(shapes):
        raise CheckpointError(f"{path} adapts {module}, which this model shares with its embeddings")
    if name is None or name not in shapes:
        raise CheckpointError(f"{path} adapts {module}, which this model has not: is it for another base?")
    if (b.shape[0], a.shape[1]) != tuple(shapes[name]) or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{path} adapts a {module} of {b.shape[0]} × {a.shape[1]}, but this model's is "
            f"{' × '.join(map(str, shapes[name]))}: is the adapter for another base?"
        )
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
        config.get("lora_alpha", 8),
    )
    rank = a.shape[0]
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if rotary_heads(name, args) is not None:
        b = to_native_rows(b, args.head_dim)
    return name, (b.to(torch.float32) * scale, a)
