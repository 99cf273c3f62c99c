"""A checkpoint's `params.json`: the arguments of `ModelArgs`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from llama.errors import ArgumentError, CheckpointError, check_number, shown
from llama.files import check_kinds, read_json
from llama.model_args import LARGEST, ModelArgs
from llama.quantization import LAYOUT, QUANTIZATIONS
from llama.vision import VisionArgs, make_args


def read_params(ckpt_dir: Path) -> dict[str, Any]:
    """The `params.json` of a checkpoint: arguments for `ModelArgs`, and perhaps `quantization`.

    Raises FileNotFoundError if there is none, CheckpointError if it does not describe a model.
    """
    if not ckpt_dir.is_dir():
        raise FileNotFoundError(f"no folder {ckpt_dir}: pass the path of a downloaded checkpoint as ckpt_dir")
    path = ckpt_dir / "params.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no params.json in {ckpt_dir}: is this a folder with a native Llama checkpoint?"
        )
    params = read_json(path)
    if isinstance(params.get("model"), dict):
        params = params["model"]  # the layout of some vision models
    if not {"dim", "n_layers", "n_heads"} <= params.keys():
        raise CheckpointError(f"{path} lacks dim, n_layers or n_heads; download it again")
    kind = VisionArgs if "vision_chunk_size" in params else ModelArgs
    known = {field.name for field in fields(kind)} - {"max_images"}
    if unknown := sorted(params.keys() - known - {"quantization"}):
        raise CheckpointError(f"{path} has {shown(unknown[0])}, which this model does not implement")
    if "quantization" in params:
        found = params["quantization"]
        scheme = found.get("scheme") if isinstance(found, dict) and found.get("layout") == LAYOUT else None
        if scheme not in QUANTIZATIONS:
            raise CheckpointError(
                f"{path} has quantization={shown(found)}, written by another version of this package: run "
                "`python -m llama convert --quantize` again on the folder it was converted from"
            )
        params["quantization"] = scheme
    # LLaMA 1 and 2 predate this key and use the original paper's theta.
    return checked(path, {"rope_theta": 10000.0, **params})


def checked(path: Path, params: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `make_args`, unchanged. Raises CheckpointError, naming the file, if invalid."""
    check_kinds(path, params, {"use_scaled_rope": (bool,)})
    try:
        make_args({key: value for key, value in params.items() if key != "quantization"})
    except ArgumentError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return params


def feed_forward(path: Path, dim: Any, hidden_dim: Any) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` for which `ModelArgs.hidden_dim` equals `hidden_dim`.

    path: named in the CheckpointError if a size is invalid.
    """
    for name, value in (("the model size", dim), ("the feed-forward size", hidden_dim)):
        try:
            check_number(name, value, LARGEST["dim"])
        except ArgumentError as error:
            raise CheckpointError(f"{path}: {error}") from None
    plain = int(2 * 4 * dim / 3)
    for multiple_of in (256, 1024, 4096):
        if multiple_of * -(-plain // multiple_of) == hidden_dim:
            return {"multiple_of": multiple_of}
    # Half a unit more than needed, because the product is rounded down.
    return {"multiple_of": 1, "ffn_dim_multiplier": (hidden_dim + 0.5) / plain}
