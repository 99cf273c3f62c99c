"""LoRA adapters in PEFT's format, merged into the weights of any checkpoint as they are read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.huggingface import native_name, open_weights, rotary_heads, to_native_rows
from llama.checkpoint.mllama import mllama_name, usual_name
from llama.checkpoint.source import TensorSource, check_float, is_tied
from llama.errors import CheckpointError, shown
from llama.files import check_kinds, is_kind, read_json
from llama.model import ModelArgs
from llama.parallel import Span
from llama.quantization import EMBEDDINGS, LEARNABLE, OUTPUT
from llama.vision import VisionArgs

# Keys of adapter_config.json that do not affect how the saved factors are merged. All others change the
# result, so they must be absent, null, false or empty, or have the value in `REQUIRED`.
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern",
    "rank_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "lora_alpha", "use_rslora", "alpha_pattern", "init_lora_weights",
}  # fmt: skip
REQUIRED = {"peft_type": "LORA", "bias": "none"}
KINDS: dict[str, tuple[type, ...]] = {
    **{"lora_alpha": (float,), "use_rslora": (bool,), "alpha_pattern": (dict,)},
    **{"init_lora_weights": (bool, str), "peft_type": (str,), "bias": (str,)},
}
# Initialisations that leave the base unchanged, and those that subtract the factors' product from it in a
# way that can be repeated from the base and the adapter's files. PEFT has others, such as corda and loftq,
# which depend on data or random numbers.
PLAIN = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal")
SUBTRACTED = ("pissa", "olora")


class Adapted:
    """A `TensorSource` with an adapter merged in: W + scale · B A (Hu et al. 2021, section 4.1), in fp32.

    Raises FileNotFoundError if a file of the adapter is missing, CheckpointError if the adapter is of
    another kind or was trained for another base model.
    """

    def __init__(self, base: TensorSource, folder: Path, args: ModelArgs) -> None:
        self.base, self.dtype = base, base.dtype
        self._replaced, self._deltas = read_adapter(folder, base, args)
        # An adapter for the embeddings does not apply to an output layer that shares their weights.
        self._untied = is_tied(base.shapes) and EMBEDDINGS in self._deltas
        self.shapes = {**base.shapes, **({OUTPUT: base.shapes[EMBEDDINGS]} if self._untied else {})}

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        stored = EMBEDDINGS if name == OUTPUT and self._untied else name
        if (weight := self._replaced.get(stored)) is None:
            weight = self.base.read(stored, dim, span)
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


def read_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json. Raises CheckpointError, naming the key, if the adapter cannot be merged."""
    config = read_json(path)
    check_kinds(path, config, KINDS)
    for key, value in config.items():
        if key not in HARMLESS and value and value != REQUIRED.get(key):
            raise CheckpointError(f"{path} has {shown(key)[1:-1]}={shown(value)}, which cannot be merged")
    kind = config.get("init_lora_weights")
    config["init_lora_weights"] = kind = kind.lower() if isinstance(kind, str) else kind
    if kind not in (*PLAIN, *SUBTRACTED):
        raise CheckpointError(
            f"{path} has init_lora_weights={shown(kind)}, which changed the base model in a way that these "
            "files do not record: save the adapter as a plain LoRA with PEFT "
            "(path_initial_model_for_weight_conversion)"
        )
    patterns = config.get("alpha_pattern") or {}
    for key, value in [("lora_alpha", config.get("lora_alpha", 8)), *patterns.items()]:
        if value is None or not is_kind(value, float) or not abs(value) < 1e30:
            raise CheckpointError(f"{path}: the alpha of {shown(key)} must be a number, not {shown(value)}")
        # Keys are regular expressions: without groups and with few repetitions, matching is fast.
        if len(key) > 200 or "(" in key or len(re.findall(r"[*+?{]", key)) > 3 or not _compiles(key):
            raise CheckpointError(f"{path}: the alpha_pattern key {shown(key)} is too complex")
    return config


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def read_adapter(
    folder: Path, base: TensorSource, args: ModelArgs
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """An adapter's changes to each tensor, by native name.

    Returns whole tensors that replace the base's (PEFT saves adapted embeddings), and factors
    B (out, r), including the scale, and A (r, in), fp32, with rows in native order.
    """
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter_config.json in {folder}: is it an adapter in PEFT's format?")
    config = read_config(folder / "adapter_config.json")
    paths = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no adapter_model.safetensors in {folder}: is the download complete?")
    opened = open_weights(path)
    names = list(opened.keys())
    tensors = {name: opened[name] if isinstance(opened, dict) else opened.get_tensor(name) for name in names}
    native = namer(path, base, args)
    replaced: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", name)
        if whole := re.fullmatch(
            r"base_model\.model\.((?:\S+\.)?(?:lm_head|embed_tokens))(\.base_layer)?\.weight", name
        ):
            found = native(whole[1])
            if found is None or tuple(tensor.shape) != base.shapes.get(found):
                raise CheckpointError(
                    f"{path} has {whole[1]} of shape {tuple(tensor.shape)}, which does not match this model: "
                    "was the adapter trained on another base model, or with added tokens?"
                )
            check_float(path, name, tensor)
            replaced[found] = tensor
            continue
        if not match:
            raise CheckpointError(f"{path} has {shown(name)}, which is not part of a plain LoRA")
        check_float(path, name, tensor)
        if tensor.dim() != 2 or tensor.numel() == 0:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, but a LoRA factor must be a matrix"
            )
        # Embeddings are looked up by row, so their factors are stored in the opposite order.
        which = match[3] if not match[2] else "BA"["AB".index(match[3])]
        pairs.setdefault(match[1], {})[which] = tensor.float().T if match[2] else tensor.float()
    deltas = (
        _delta(path, config, module, native(module), pair, base, args) for module, pair in pairs.items()
    )
    return replaced, dict(deltas)


def namer(path: Path, base: TensorSource, args: ModelArgs) -> Callable[[str], str | None]:
    """A function from a module's name in `transformers` to the native name of its weight, None if unknown.

    It raises CheckpointError for a vision model's embeddings.
    """
    if not isinstance(args, VisionArgs):
        return lambda module: native_name(f"{module}.weight")
    names = {mllama_name(name, args): name for name in base.shapes if name != LEARNABLE}

    def native(module: str) -> str | None:
        name = names.get(usual_name(f"{module}.weight"))
        if name == EMBEDDINGS:
            raise CheckpointError(
                f"{path} adapts {module}, whose last rows belong to images: adapters merge only into the "
                "other layers of a vision model"
            )
        return name

    return native


def _delta(
    path: Path,
    config: Mapping[str, Any],
    module: str,
    name: str | None,
    pair: Mapping[str, Tensor],
    base: TensorSource,
    args: ModelArgs,
) -> tuple[str, tuple[Tensor, Tensor]]:
    shapes = base.shapes
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{path} has only one of the two factors of {module}; download it again")
    a, b = pair["A"], pair["B"]
    if name == OUTPUT and is_tied(shapes):
        raise CheckpointError(f"{path} adapts {module}, which this model shares with its embeddings")
    if name is None or name not in shapes:
        raise CheckpointError(
            f"{path} adapts {module}, which this model does not have: was it trained on another base model?"
        )
    if (b.shape[0], a.shape[1]) != tuple(shapes[name]) or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{path} adapts a {module} of {b.shape[0]} × {a.shape[1]}, but this model's is "
            f"{' × '.join(map(str, shapes[name]))}: was it trained on another base model?"
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
    b = b * scale
    if (kind := config.get("init_lora_weights")) in SUBTRACTED:
        if name == EMBEDDINGS:
            raise CheckpointError(
                f"{path} adapts {module} with init_lora_weights={kind!r}, which only linear layers support"
            )
        out, into = initial(base.read(name).float(), rank, scale, kind)
        b, a = torch.cat((b, -out), 1), torch.cat((a, into))
    return name, (b, a)


def initial(weight: Tensor, rank: int, scale: float, kind: str) -> tuple[Tensor, Tensor]:
    """The factors (out, rank) and (rank, in) whose product an initialisation subtracted from the base, fp32.

    kind: "pissa", the largest singular values (Meng et al. 2024, section 3), or "olora", the first
    columns of an orthogonal basis (Büyükakyüz 2024, section 3), the latter times the scale.
    """
    if kind == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank] * s[:rank], v[:rank]
    q, r = torch.linalg.qr(weight)
    return q[:, :rank] * scale, r[:rank]
