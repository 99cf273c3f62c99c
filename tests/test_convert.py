"""Conversions there and back, their memory, and what is left when one goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llama import Llama
from llama.checkpoint import convert as convert_module
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.errors import CheckpointError
from tests.support import formats, gguf_files
from tests.support.lora import train

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
LLAMA3 = {**PARAMS, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 640}
LLAMA2 = {**PARAMS, "vocab_size": -1}


def native(
    folder: Path, kind: str, shards: int = 1, dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, dict[str, torch.Tensor]]:
    params: dict[str, Any] = LLAMA2 if kind == "llama2" else LLAMA3
    tokenizer = formats.sentencepiece_model() if kind == "llama2" else formats.tiktoken_ranks()
    weights = formats.random_weights(params, 400 if kind == "llama2" else 640, kind == "tied", dtype)
    return formats.write_native(folder, params, weights, tokenizer, shards), weights


def shards_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(path) for path in sorted(folder.glob("consolidated.*.pth"))]


def assert_same_files(one: Path, other: Path) -> None:
    """Bit-identical tensors in every file; rope.freqs, which follows from params.json, may lack."""
    for a, b in zip(shards_of(one), shards_of(other), strict=True):
        a.pop("rope.freqs", None)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", ["llama2", "llama3", "tied"])
@pytest.mark.parametrize("shards", [1, 2])
def test_round_trip_by_hugging_face(kind: str, shards: int, tmp_path: Path) -> None:
    source, weights = native(tmp_path / "source", kind, shards)
    hf = convert(source, tmp_path / "hf", "hf", shards=3)
    assert len([*hf.glob("*.safetensors")]) == 3
    back = convert(hf, tmp_path / "back", shards=shards)
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert_same_files(source, back)

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    llama = Llama.build(source, max_seq_len=64, max_batch_size=2, dtype="float32", device="cpu")
    again = Llama.build(hf, max_seq_len=64, max_batch_size=2, dtype="float32", device="cpu")
    tokens = torch.randint(0, len(weights["tok_embeddings.weight"]), (2, 48))
    expected = formats.logits_of(model, tokens)
    torch.testing.assert_close(llama.model.forward(tokens, 0), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.model.forward(tokens, 0), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_tokenizer_and_template_for_transformers(kind: str, tmp_path: Path) -> None:
    source, _ = native(tmp_path / "source", kind)
    hf = convert(source, tmp_path / "hf", "hf")
    ours, theirs = open_checkpoint(source), AutoTokenizer.from_pretrained(hf)
    again = open_checkpoint(hf)
    for text in formats.random_texts(1000):
        expected = ours.tokenizer.encode(text, bos=True, eos=False)
        assert again.tokenizer.encode(text, bos=True, eos=False) == expected
        if not any(special in text for special in ours.tokenizer.special_tokens) and "<unk>" not in text:
            assert theirs.encode(text) == expected
            assert theirs.decode(expected[1:]) == ours.tokenizer.decode(expected[1:])
    dialog = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": " hello "},
        {"role": "assistant", "content": "world\n"},
        {"role": "user", "content": "why?"},
    ]
    for start in (0, 1):
        expected = ours.formatter.encode_dialog_prompt(dialog[start:])
        rendered = theirs.apply_chat_template(dialog[start:], add_generation_prompt=True)["input_ids"]
        assert rendered == expected
        assert again.formatter.encode_dialog_prompt(dialog[start:]) == expected
    assert [*{*ours.tokenizer.stop_tokens}] == [*{*stops(hf)}]
    context = json.loads((hf / "config.json").read_text())["max_position_embeddings"]
    assert context == ours.context


def stops(hf: Path) -> list[int]:
    eos = GenerationConfig.from_pretrained(hf).eos_token_id
    return eos if isinstance(eos, list) else [eos]


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_reshard_and_back(kind: str, tmp_path: Path) -> None:
    source, weights = native(tmp_path / "source", kind, 2)
    one = convert(source, tmp_path / "one", shards=1)
    assert dict.fromkeys(weights, True) == {
        name: torch.equal(shards_of(one)[0][name], weights[name]) for name in weights
    }
    four = convert(one, tmp_path / "four", shards=4)
    assert len(shards_of(four)) == 4
    assert_same_files(source, convert(four, tmp_path / "two", shards=2))
    params = json.loads((four / "params.json").read_text())
    assert {key: params[key] for key in PARAMS} == PARAMS
    assert (four / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert "rope_scaling_factor" not in params  # Meta's own reader does not know it


def test_foreign_hugging_face_model_becomes_native(tmp_path: Path) -> None:
    """With a tokenizer that has no native form, and shapes that params.json can hardly say."""
    params = {**PARAMS, "rope_theta": 500000.0, "multiple_of": 4, "ffn_dim_multiplier": 0.9, "head_dim": 32}
    model = formats.write_hf(tmp_path / "hf", params, formats.random_weights(params, 400))
    theirs = formats.hf_tokenizer(tmp_path / "hf")
    folder = convert(tmp_path / "hf", tmp_path / "native", shards=2)
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=1, dtype="float32", device="cpu")
    tokens = torch.randint(0, 400, (1, 32))
    expected = formats.logits_of(model, tokens)
    torch.testing.assert_close(llama.model.forward(tokens, 0), expected, atol=1e-4, rtol=0)
    dialog = [{"role": "user", "content": "hello"}]
    expected_ids = theirs.apply_chat_template(dialog, add_generation_prompt=True)["input_ids"]
    assert llama.formatter.encode_dialog_prompt(dialog) == expected_ids


def test_base_model_stays_one(tmp_path: Path) -> None:
    source, weights = native(tmp_path / "source", "llama3")
    weights["tok_embeddings.weight"][384 + 6] = 0  # <|start_header_id|>, never trained
    torch.save(weights, source / "consolidated.00.pth")
    hf = convert(source, tmp_path / "hf", "hf")
    for folder in (source, hf, convert(source, tmp_path / "mine"), convert(hf, tmp_path / "again")):
        with pytest.raises(ValueError, match="base model"):
            open_checkpoint(folder).formatter.encode_dialog_prompt([{"role": "user", "content": "hi"}])


def test_dtype(tmp_path: Path) -> None:
    source, weights = native(tmp_path / "source", "llama3", dtype=torch.float32)
    folder = convert(source, tmp_path / "bf16", dtype="bf16")
    assert {tensor.dtype for tensor in shards_of(folder)[0].values()} == {torch.bfloat16}
    name = "layers.0.attention.wq.weight"
    assert torch.equal(shards_of(folder)[0][name], weights[name].bfloat16())


@pytest.mark.parametrize("options", [{}, {"shards": 2}, {"to": "hf"}, {"quantize": "int8"}], ids=str)
def test_damaged_weights_are_named_and_nothing_is_written(options: dict[str, Any], tmp_path: Path) -> None:
    source, weights = native(tmp_path / "source", "llama3")
    weights["layers.1.attention.wk.weight"][3, 5] = torch.nan
    torch.save(weights, source / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"layers.1.*(wk|k_proj).weight has NaN"):
        convert(source, tmp_path / "out" / "model", **options)
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["native", "hf", "gguf"])
def test_quantized_from_any_format(kind: str, scheme: str, tmp_path: Path) -> None:
    weights, model = formats.random_weights(LLAMA2, 400), formats.sentencepiece_model()
    source = formats.write_native(tmp_path / "source", LLAMA2, weights, model, 2)
    train(tmp_path / "adapter", formats.oracle(weights, LLAMA2))
    if kind == "hf":
        source = convert(source, tmp_path / "hf", "hf", shards=3)
    elif kind == "gguf":
        source = gguf_files.write_gguf(
            tmp_path / "m.gguf", PARAMS, weights, gguf_files.sentencepiece_fields(model)
        )
    options: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 2, "dtype": "float32", "device": "cpu"}
    tokens = torch.randint(0, 400, (2, 32))
    for adapter in (None, tmp_path / "adapter"):
        folder = convert(source, tmp_path / f"to-{adapter is None}", adapter=adapter, quantize=scheme)
        llama = Llama.build(folder, **options)
        once = Llama.build(source, **options, adapter=adapter, quantize=scheme)
        assert torch.equal(llama.model(tokens, 0), once.model(tokens, 0))
        # Both of them could have left the adapter, or the model, out.
        exact = Llama.build(source, **options, adapter=adapter).model(tokens, 0)
        error = (llama.model(tokens, 0) - exact).norm() / exact.norm()
        assert error < (0.1 if scheme == "int8" else 0.5)
        ids = (model.tokenizer.encode("hello", bos=True, eos=False) for model in (llama, once))
        assert next(ids) == next(ids)
        assert type(llama.formatter) is type(once.formatter)
        if adapter is None:
            plain = exact
    assert (exact - plain).norm() / plain.norm() > 0.5


def test_quantized_tensors_have_their_dtypes_and_a_base_model_stays_one(tmp_path: Path) -> None:
    source, weights = native(tmp_path / "source", "llama3")
    weights["tok_embeddings.weight"][384 + 6] = 0  # <|start_header_id|>, never trained
    torch.save(weights, source / "consolidated.00.pth")
    folder = convert(source, tmp_path / "int8", quantize="int8")
    with pytest.raises(ValueError, match="base model"):
        open_checkpoint(folder).formatter.encode_dialog_prompt([{"role": "user", "content": "hi"}])
    assert open_checkpoint(folder).weights.dtype == torch.bfloat16
    [tensors] = shards_of(convert(source, folder, quantize="int4", dtype="fp16", overwrite=True))
    dtypes = {name.partition(".attention.")[2] or name: tensor.dtype for name, tensor in tensors.items()}
    assert dtypes["norm.weight"] == torch.float16
    assert dtypes["tok_embeddings.weight"] == torch.int8
    assert dtypes["wq.weight"] == torch.uint8
    assert dtypes["wq.scales"] == dtypes["wq.mins"] == torch.float16
    assert (dtypes["output.weight"], dtypes["output.scales"]) == (torch.int8, torch.float16)
    params = json.loads((folder / "params.json").read_text())
    assert {key: params[key] for key in PARAMS} == PARAMS
    assert params["quantization"] == {"scheme": "int4", "layout": 2}


def test_quantized_weights_are_converted_no_further(tmp_path: Path) -> None:
    source, _ = native(tmp_path / "source", "llama3")
    folder = convert(source, tmp_path / "int8", quantize="int8")
    for options in ({"to": "hf"}, {"to": "native", "shards": 2}, {"quantize": "int8"}, {"quantize": "int4"}):
        with pytest.raises(ValueError, match="holds int8 weights, whose lost precision cannot be restored"):
            convert(folder, tmp_path / "again", **options)
    with pytest.raises(ValueError, match="holds int8 weights, and adapters merge only"):
        open_checkpoint(folder, adapter=tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "int8"}


def test_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    source, _ = native(tmp_path / "source", "llama3")
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(FileExistsError, match="already exists"):
        convert(source, target, "hf")
    assert (target / "mine").exists()
    convert(source, target, "hf", overwrite=True)
    assert not (target / "mine").exists()
    assert (target / "config.json").exists()
    with pytest.raises(ValueError, match="source itself"):
        convert(source, source, overwrite=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"to": "onnx"}, "native or hf"),
        ({"shards": 0}, "whole number"),
        ({"shards": 3}, "does not split into"),
        ({"shards": 1000, "to": "hf"}, "more than the"),
        ({"dtype": "int3"}, "dtype must be"),
        ({"quantize": "fp8"}, "--quantize must be one of int8, int5, int4 in a conversion, not 'fp8'"),
        ({"quantize": "int8", "to": "hf"}, "leave out --to hf"),
        ({"quantize": "int8", "shards": 1000}, "more than the"),
    ],
)
def test_wrong_arguments_leave_nothing(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    source, _ = native(tmp_path / "source", "llama3")
    with pytest.raises(ValueError, match=match):
        convert(source, tmp_path / "out" / "target", **options)
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]


def test_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    source, _ = native(tmp_path / "source", "llama3", 2)
    shard = source / "consolidated.01.pth"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


BIG = {"dim": 512, "n_layers": 24, "n_heads": 8, "n_kv_heads": 8, "multiple_of": 256, "norm_eps": 1e-5}


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """About 320 MB in four files."""
    folder = tmp_path_factory.mktemp("big") / "source"
    ranks = formats.tiktoken_ranks(0)
    params = {**BIG, "vocab_size": 512, "rope_theta": 500000.0}
    weights = formats.random_weights(params, 512)
    size = sum(weight.nbytes for weight in weights.values())
    return formats.write_native(folder, params, weights, ranks, 4), size


MEASURE = """
import resource, sys, threading, time
import torch, numpy
from llama.checkpoint.convert import convert
from llama.checkpoint.convert import convert as run
from pathlib import Path

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

to, _, quantize = sys.argv[3].partition(" ")
options = {"to": to, "quantize": quantize or None}
run(sys.argv[4], sys.argv[2] + ".small", **options)  # what any conversion needs, imports and all
Path("/proc/self/clear_refs").write_text("5")
before = status("VmHWM")
run(sys.argv[1], sys.argv[2], **options, shards=16)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["native", "hf", "native int4"])
def test_memory_is_that_of_one_output_shard(
    to: str, big_checkpoint: tuple[Path, int], tmp_path: Path
) -> None:
    source, size = big_checkpoint
    small, _ = native(tmp_path / "small", "llama3")
    command = [sys.executable, "-c", MEASURE, source, tmp_path / "out", to, small]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grown = int(result.stdout)
    assert grown < size / 4, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_conversion_leaves_no_folder(
    how: signal.Signals, big_checkpoint: tuple[Path, int], tmp_path: Path
) -> None:
    source, _ = big_checkpoint
    command = [sys.executable, "-m", "llama", "convert", source, tmp_path / "out" / "target", "--shards", "8"]
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # Background jobs and some CI ignore the signal, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not [*tmp_path.glob("out/.target.*/checkpoint/*.pth")] and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, how)
    assert process.wait(30) != 0
    assert not (tmp_path / "out" / "target").exists()
    if how != signal.SIGKILL:
        assert not [*(tmp_path / "out").iterdir()]


def test_command_line(command_line, tmp_path: Path) -> None:
    source, _ = native(tmp_path / "source", "llama3", 2)
    line = ["convert", source, tmp_path / "hf", "--to", "hf", "--dtype", "fp32"]
    assert command_line(*line)[:2] == (0, f"Wrote {tmp_path / 'hf'}\n")
    code, _, error = command_line(*line)
    assert code == 1
    assert error.startswith("error: ")
    assert "already exists" in error
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_an_interrupted_overwrite_keeps_one_whole_folder(
    error: type[BaseException], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / folder.name).touch()
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == (1 if when == "before" else 2):
            if when == "after":
                rename(self, target)
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(error):
        convert_module.replace_folder(old, new, tmp_path / "aside")
    assert [path.name for path in old.iterdir()] == ["new" if when == "after" else "old"]
