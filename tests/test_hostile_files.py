"""Files of a checkpoint with any value at any key, any bit flipped: a sentence, or a right load.

Every mutation of a tiny checkpoint's files is opened. What comes of it is a checkpoint, or one of the
errors that are sentences, which name a file; anything else is a fault of this package.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.errors import ArgumentError, CheckpointError, LlamaError, MissingPackageError
from llama.tokenizer import Layout, Tokenizer
from tests.support import formats, gguf_files, tiny

PARAMS = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 8, "norm_eps": 1e-5}
PARAMS |= {"rope_theta": 500000.0}
# Of every JSON type, and what is most often believed of each.
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 10**6, 10**9, 2**63, -(2**64), 10**300, 0.5, -0.0, 1e-300, 1e300),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "false",
        "8",
        "\x1b[31m",
        "../../x",
        "a" * 10**5,
        "\ud800",
        "{{ 1/0 }}",
    ),
    *([], {}, [[]], [None], [1], ["x"], {"": None}, {"x": 1}, [{"name": 1}], {"content": 3}),
]


def open_or_explain(path: Path, seed: object) -> None:
    """Opens a checkpoint and writes with its tokenizer, or demands a sentence that names a file."""
    start = time.process_time()
    try:
        adapter = path if (path / "adapter_config.json").exists() else None
        checkpoint = open_checkpoint(path / "base" if adapter else path, adapter=adapter)
        checkpoint.weights.read("norm.weight")
        checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("hello 1 ñ", bos=True, eos=True))
        checkpoint.formatter.encode_dialog_prompt([{"role": "user", "content": "hello"}])
    except MissingPackageError:
        raise
    except (LlamaError, FileNotFoundError) as error:
        text = str(error)
        assert "\x1b" not in text, seed
        assert len(text) < 1500, seed
    except Exception as error:
        raise AssertionError(f"{seed}: {type(error).__name__}: {error}") from error
    assert time.process_time() - start < 5, seed


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document, a few of each list."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    return [at, *(place for key, child in items for place in places(child, (*at, key)))]


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy of a document with another value at a place; a key is taken away by `...`."""
    if not at:
        return new
    copy = value.copy()
    if new is ... and len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = replaced(value[at[0]], at[1:], new)
    return copy


def mutate_json(path: Path, generator: random.Random) -> object:
    content = json.loads(path.read_text("utf-8"))
    at = generator.choice(places(content)[:400])
    new = generator.choice([..., *VALUES]) if at else generator.choice(VALUES)
    try:
        path.write_text(json.dumps(replaced(content, at, new)), "utf-8")
    except UnicodeEncodeError:
        path.write_text(json.dumps(replaced(content, at, "?")), "utf-8")
    return path.name, at, new if new is ... else repr(new)[:40]


def mutate_bytes(path: Path, generator: random.Random) -> object:
    data = bytearray(path.read_bytes())
    kind = generator.choice(["flip", "flip", "flip", "cut", "insert", "zero", "swap"])
    at = generator.randrange(min(len(data), generator.choice([64, 4096, len(data)])))
    if kind == "flip":
        data[at] ^= 1 << generator.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = generator.randbytes(generator.randrange(1, 9))
    elif kind == "zero":
        data[at : at + 8] = generator.choice([b"\0", b"\xff"]) * 8
    else:
        data[at : at + 8] = data[:8]
    path.write_bytes(bytes(data))
    return path.name, kind, at


def native(folder: Path) -> Path:
    ranks = formats.tiktoken_ranks(8)
    formats.write_native(folder, PARAMS, formats.random_weights(PARAMS, len(ranks) + 256), ranks, 1)
    params = json.loads((folder / "params.json").read_text())
    full = {"use_scaled_rope": True, "rope_scaling_factor": 8.0, "ffn_dim_multiplier": 1.0, "head_dim": 8}
    (folder / "params.json").write_text(json.dumps(full | params))
    Tokenizer(folder / "tokenizer.model").layout.write(folder / "format.json")
    return folder


def hugging_face(folder: Path) -> Path:
    formats.write_hf(folder, PARAMS, formats.random_weights(PARAMS, 400), max_shard_size="20KB")
    formats.hf_tokenizer(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|eot_id|>"}}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    config = json.loads((folder / "config.json").read_text())
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"rope_type": "llama3", "original_max_position_embeddings": 8192, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": llama3}))
    return folder


def gguf(folder: Path) -> Path:
    folder.mkdir()
    ranks = formats.tiktoken_ranks(8)
    weights = formats.random_weights(PARAMS, len(ranks) + len(formats.SPECIAL))
    tokenizer = gguf_files.byte_level_fields(ranks, chat_template="{{ messages[0].content }}")
    gguf_files.write_gguf(folder / "m.gguf", PARAMS, weights, tokenizer)
    return folder


def sentencepiece(folder: Path) -> Path:
    folder.mkdir()
    model = formats.sentencepiece_model(330)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    torch.save(formats.random_weights(PARAMS, 330), folder / "consolidated.00.pth")
    (folder / "tokenizer.model").write_bytes(model)
    return folder


def adapter(folder: Path) -> Path:
    native(folder / "base")
    a, b = torch.randn(2, PARAMS["dim"]), torch.randn(PARAMS["dim"], 2)
    names = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
    pairs = {
        names.format(module, which): m
        for module in ("q_proj", "o_proj")
        for which, m in zip("AB", (a, b), strict=True)
    }
    save_file({name: tensor.clone() for name, tensor in pairs.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": False, "init_lora_weights": True}
    config |= {"alpha_pattern": {"q_proj": 4}, "rank_pattern": {}, "target_modules": ["q_proj", "o_proj"]}
    config |= {"bias": "none", "layers_to_transform": None, "modules_to_save": None, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


FORMATS: dict[str, Callable[[Path], Path]] = {
    f.__name__: f for f in (native, hugging_face, gguf, sentencepiece, adapter)
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "runs", [pytest.param(60, marks=pytest.mark.slow), pytest.param(600, marks=pytest.mark.soak)]
)
def test_any_mutation_is_a_sentence_or_loads(kind: str, runs: int, tmp_path: Path) -> None:
    whole = FORMATS[kind](tmp_path / "whole")
    files = sorted(path for path in whole.iterdir() if path.is_file())
    texts = [path for path in files if path.suffix == ".json"]
    generator = random.Random(7)
    folder = tmp_path / "mutated"
    shutil.copytree(whole, folder)
    for run in range(runs):
        original = generator.choice(texts if texts and generator.random() < 0.7 else files)
        path = folder / original.name
        mutate = mutate_json if original in texts and generator.random() < 0.8 else mutate_bytes
        seed = (run, mutate(path, generator))
        open_or_explain(folder, seed)
        shutil.copyfile(original, path)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_mutated_loads_as_it_is(kind: str, tmp_path: Path) -> None:
    whole = FORMATS[kind](tmp_path / "model")
    open_checkpoint(
        whole / "base" if kind == "adapter" else whole, adapter=whole if kind == "adapter" else None
    )


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(4).to_sparse(), "sparse"),
        (torch.eye(4).to_sparse_csr(), "sparse"),
        (torch.empty(4, 4, device="meta"), "meta"),
        (torch.nested.nested_tensor([torch.ones(4), torch.ones(2)]), "nested"),
        (torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8), "quantized"),
    ],
)
def test_tensors_that_are_not_plain_are_refused(tensor: torch.Tensor, kind: str, tmp_path: Path) -> None:
    folder = native(tmp_path / "model")
    weights = torch.load(folder / "consolidated.00.pth")
    torch.save({**weights, "norm.weight": tensor}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=rf"consolidated.00.pth.*({kind}|contains more than tensors)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("depth", [10**3, 10**6])
@pytest.mark.parametrize("name", ["params.json", "format.json"])
def test_deep_json_is_a_sentence(name: str, depth: int, tmp_path: Path) -> None:
    folder = native(tmp_path / "model")
    (folder / name).write_text("[" * depth + "]" * depth)
    with pytest.raises(CheckpointError, match=f"{name} (nests|is not a JSON object)"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"rope_theta": value} for value in (0, -1, float("nan"), None, 1e300)),
        *({"use_scaled_rope": True, "rope_scaling_factor": value} for value in (0, -8, float("nan"))),
        *({"norm_eps": value} for value in (None, float("inf"), -1e-5, 0)),
        *({"use_scaled_rope": value} for value in ("false", 1)),
        *({"n_layers": value} for value in (10**6, 1.0, True)),
        {"use_scaled_rope": True, "low_freq_factor": 4.0},
        {"ffn_dim_multiplier": 1e12},
        {"vocab_size": 10**12},
    ],
)
def test_numbers_that_no_model_has_are_refused_before_work(change: dict[str, Any], tmp_path: Path) -> None:
    folder = native(tmp_path / "model")
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, **change}))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"params.json: .*({list(change)[-1]}|feed-forward)"):
        open_checkpoint(folder)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_damaged_weights_are_named_as_they_load(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = native(tmp_path / "model")
    weights = {name: w.to(dtype) for name, w in torch.load(folder / "consolidated.00.pth").items()}
    weights["layers.0.attention.wq.weight"][3, 5] = value
    torch.save(weights, folder / "consolidated.00.pth")
    for quantize in (None, "int8"):
        with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wq\.weight has NaN or infinite"):
            Llama.build(folder, device="cpu", dtype="float32", max_seq_len=8, quantize=quantize)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wq\.weight has NaN or infinite"):
        convert(folder, tmp_path / "int8", quantize="int8")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("YQ== 260", "line 265 repeats a token from an earlier line"),
        ("enp6eg== 263", "each exactly once"),
        ("enp6eg== 264", ""),
        ("enp6eg== 999999", "each exactly once"),
        ("YWE= 265", "each exactly once"),
        ("enp6eg== -1", "each exactly once"),
        ("enp6eg== 99999999999999999999", "each exactly once"),
    ],
)
def test_ranks_are_unique_and_no_special_tokens(line: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    tiny.write_ranks(path, formats.tiktoken_ranks(8))
    with path.open("a") as file:
        file.write(f"{line}\n")
    if not sentence:
        assert Tokenizer(path).n_words == 265 + 256
        return
    with pytest.raises(CheckpointError, match=sentence):
        Tokenizer(path)
    special = Layout.llama3(264)
    with pytest.raises(ArgumentError, match="each exactly once"):
        Tokenizer.from_ranks(formats.tiktoken_ranks(9), special)


@pytest.mark.parametrize("pattern", ["(", "(?=", r"(a+)+$", "[" * 10**4])
def test_a_pattern_never_panics(pattern: str, tmp_path: Path) -> None:
    tiny.write_ranks(tmp_path / "tokenizer.model", formats.tiktoken_ranks(8))
    (tmp_path / "format.json").write_text(json.dumps({"pattern": pattern}))
    with contextlib.suppress(LlamaError):
        Tokenizer(tmp_path / "tokenizer.model").encode("a" * 40 + "b", bos=False, eos=False)
