"""GGUF files, read in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from llama import Llama, backends
from llama.backends import Plan
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.checkpoint.gguf import GGUFError
from llama.checkpoint.source import QuantizedSource
from llama.errors import CheckpointError
from llama.tokenizer import SentencePieceTokenizer, Tokenizer
from tests.support import formats, gguf_files
from tests.support.quantized import KEPT, distance

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
PARAMS |= {"rope_theta": 500000.0}
RANKS = formats.tiktoken_ranks()
SIZE = len(RANKS) + len(formats.SPECIAL)


def build(path: Path) -> Llama:
    return Llama.build(path, max_seq_len=64, max_batch_size=2, dtype="float32", device="cpu")


def byte_level(path: Path, params: dict[str, Any] = PARAMS, tied: bool = False, **options: Any) -> Path:
    fields = gguf_files.byte_level_fields(RANKS, **options.pop("tokenizer", {}))
    weights = options.pop("weights", None) or formats.random_weights(params, SIZE, tied)
    return gguf_files.write_gguf(path, params, weights, fields, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", [{}, {"head_dim": 32}, {"multiple_of": 4, "ffn_dim_multiplier": 0.9}])
def test_logits_are_those_of_transformers(change: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    params = {**PARAMS, **change}
    weights = formats.random_weights(params, SIZE, tied)
    llama = build(byte_level(tmp_path / "model.gguf", params, weights=weights))
    tokens = torch.randint(0, SIZE, (2, 32))
    expected = formats.logits_of(formats.oracle(weights, params), tokens)
    torch.testing.assert_close(llama.model.forward(tokens, 0), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantizations(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of what the gguf package makes of the blocks, kept or dequantized; read whole and in part."""
    weights = formats.random_weights(PARAMS, SIZE)
    path = byte_level(tmp_path / "model.gguf", weights=weights, kind=kind)
    q = gguf.GGMLQuantizationType[kind]
    rounded = {
        name: weight
        if weight.dim() == 1
        else torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), q), q)).view(weight.shape)
        for name, weight in weights.items()
    }
    tokens = torch.randint(0, SIZE, (1, 32))
    expected = formats.logits_of(formats.oracle(rounded, PARAMS), tokens)
    for plan in (Plan(), KEPT):
        monkeypatch.setattr(backends, "plan", lambda *_, plan=plan, **__: plan)
        llama = build(path)
        torch.testing.assert_close(llama.model.forward(tokens, 0), expected, atol=1e-4, rtol=0)
        assert llama.quantization == (None if "F" in kind else kind)
    source = open_checkpoint(path).weights
    assert isinstance(source, QuantizedSource)
    quantized = [name for name in rounded if source.bits(name)]
    assert len(quantized) == (0 if "F" in kind else 7 * 2 + 2)
    for name in quantized:
        block = gguf.GGML_QUANT_SIZES[q][1]
        assert source.matrix(name).nbytes == rounded[name].numel() // 32 * block  # no copy, no more memory
        assert torch.equal(source.matrix(name).dequantize(), rounded[name])
    for name, weight in rounded.items():
        assert torch.equal(source.read(name), weight)
        assert torch.equal(source.read(name, 0, (8, 24)), weight[8:24])
        if weight.dim() == 2:
            assert torch.equal(source.read(name, 1, (8, 24)), weight[:, 8:24])


@pytest.mark.parametrize("kind", sorted(gguf.quants._type_traits, key=lambda kind: kind.name))
def test_every_quantization_that_the_package_knows_is_read(kind: Any, tmp_path: Path) -> None:
    """Blocks of bytes at random, which every kind of quantization gives some meaning."""
    import numpy as np

    block, size = gguf.GGML_QUANT_SIZES[kind]
    params = {**PARAMS, "dim": 256, "n_layers": 1, "multiple_of": 256}
    weights = formats.random_weights(params, SIZE)
    path = gguf_files.write_gguf(
        tmp_path / "model.gguf", params, weights, gguf_files.byte_level_fields(RANKS)
    )
    source = open_checkpoint(path).weights
    raw = np.random.default_rng(0).integers(0, 64, (8, 256 // block * size), np.uint8)
    raw.tofile(tmp_path / "blocks")
    source.path = tmp_path / "blocks"  # type: ignore[attr-defined]
    name = "output.weight"
    where = source._where  # type: ignore[attr-defined]  # noqa: SLF001
    where[name] = (kind, raw.dtype, 0, raw.shape, (8, 256))
    expected = torch.from_numpy(gguf.dequantize(raw, kind))
    torch.testing.assert_close(source.read(name), expected, equal_nan=True)
    torch.testing.assert_close(source.read(name, 0, (2, 5)), expected[2:5], equal_nan=True)
    assert isinstance(source, QuantizedSource)
    if expected.isfinite().all() and expected.abs().max() < 1e4 and (bits := source.bits(name)):
        assert bits == {"4": 4, "5": 5}.get(kind.name[1], 8)
        found = source.matrix(name)
        assert (found.bits, found.shape) == (bits, (8, 256))
        error = (found.dequantize() - expected).unflatten(1, (-1, 32)).abs().amax(-1)
        assert (error <= 0.005 * expected.unflatten(1, (-1, 32)).abs().amax(-1) + 8e-6).all()


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    template = formats.CHAT_TEMPLATE
    path = byte_level(tmp_path / "model.gguf", tokenizer={"chat_template": template})
    checkpoint = open_checkpoint(path)
    native = Tokenizer.from_ranks(RANKS, checkpoint.tokenizer.layout)  # type: ignore[attr-defined]
    for text in formats.random_texts(300):
        ids = checkpoint.tokenizer.encode(text, bos=True, eos=False)
        assert ids == [len(RANKS), *native.encode(text, bos=False, eos=False)]
        assert checkpoint.tokenizer.decode(ids[1:]) == text
    prompt = checkpoint.formatter.encode_dialog_prompt([{"role": "user", "content": "hi"}])
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    assert checkpoint.tokenizer.decode(prompt) == f"{text}<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert checkpoint.context == 2048


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """Rebuilt from the file's pieces: the ids of the model that the pieces came from."""
    model = formats.sentencepiece_model()
    params = {**PARAMS, "rope_theta": 10000.0}
    weights = formats.random_weights(params, 400)
    path = gguf_files.write_gguf(
        tmp_path / "model.gguf", params, weights, gguf_files.sentencepiece_fields(model)
    )
    llama, original = build(path), SentencePieceTokenizer(model)
    assert isinstance(llama.tokenizer, SentencePieceTokenizer)
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "stop_tokens", "special_tokens"):
        assert getattr(llama.tokenizer, name) == getattr(original, name), name
    for text in formats.random_texts(1000):
        ids = llama.tokenizer.encode(text, bos=True, eos=False)
        assert ids == original.encode(text, bos=True, eos=False)
        assert llama.tokenizer.decode(ids) == original.decode(ids)
    with pytest.raises(ValueError, match="text_completion"):
        llama.chat_completion([[{"role": "user", "content": "hi"}]])
    tokens = torch.randint(0, 400, (1, 16))
    expected = formats.logits_of(formats.oracle(weights, params), tokens)
    torch.testing.assert_close(llama.model.forward(tokens, 0), expected, atol=1e-4, rtol=0)


def test_template_of_its_own(tmp_path: Path) -> None:
    """A template that no chat format of this package writes is rendered as it is."""
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    fields = gguf_files.sentencepiece_fields(formats.sentencepiece_model(), chat_template=template)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", PARAMS, formats.random_weights(PARAMS, 400), fields)
    checkpoint = open_checkpoint(path)
    dialog = [{"role": "user", "content": "hi</s>"}]
    ids = checkpoint.formatter.encode_dialog_prompt(dialog)
    native = open_checkpoint(convert(path, tmp_path / "native"))
    assert native.formatter.encode_dialog_prompt(dialog) == ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids[1:-1] == checkpoint.tokenizer.encode("<user>hi</s>", bos=False, eos=False)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_convert(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "plan", lambda *_, **__: Plan())
    path = byte_level(tmp_path / "model.gguf", kind=kind)
    for to in ("native", "hf"):
        folder = convert(path, tmp_path / to, to, dtype="fp32")
        tokens = torch.randint(0, SIZE, (1, 32))
        direct, converted = build(path), build(folder)
        # What the file has in 8 bits, the compiled step multiplies with activations of 8 bits.
        most = 0.03 if kind == "Q8_0" else 0
        assert distance(direct.model.forward(tokens, 0), converted.model.forward(tokens, 0)) <= most
        for text in formats.random_texts(200):
            expected = direct.tokenizer.encode(text, bos=True, eos=False)
            assert converted.tokenizer.encode(text, bos=True, eos=False) == expected


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.block_count": 3}, "lacks layers.2"),
        ({"llama.block_count": 1}, "unexpected layers.1"),
        ({"llama.embedding_length": 128}, "shape"),
        ({"tokenizer": {"pre": "klingon"}}, "klingon"),
        ({"split.count": 2}, "one of 2 parts"),
    ],
)
def test_other_files_are_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = byte_level(tmp_path / "model.gguf", **options)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(path)


def test_damaged_file(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "model.gguf")
    data = path.read_bytes()
    for size in (len(data) // 2, 100, 0):
        path.write_bytes(data[:size])
        with pytest.raises(GGUFError, match="is truncated"):
            open_checkpoint(path)


def test_merges_out_of_order_are_refused(tmp_path: Path) -> None:
    fields = gguf_files.byte_level_fields(RANKS)
    fields["merges"] = fields["merges"][::-1]
    path = gguf_files.write_gguf(tmp_path / "m.gguf", PARAMS, formats.random_weights(PARAMS, SIZE), fields)
    with pytest.raises(GGUFError, match="merges"):
        open_checkpoint(path)


def with_words(fields: dict[str, Any], template: str, *words: str) -> dict[str, Any]:
    """User-defined tokens at the end of a vocabulary."""
    n = len(words)
    more = {"tokens": [*fields["tokens"], *words], "token_type": [*fields["token_type"], *[4] * n]}
    if "scores" in fields:
        more["scores"] = [*fields["scores"], *[0.0] * n]
    return {**fields, **more, "chat_template": template}


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_user_defined_tokens(kind: str, tmp_path: Path) -> None:
    """Words are found in any text; what marks the turns of a chat is not."""
    sp = kind == "sentencepiece"
    fields = (
        gguf_files.sentencepiece_fields(formats.sentencepiece_model())
        if sp
        else gguf_files.byte_level_fields(RANKS)
    )
    fields = with_words(fields, CHATML, "[word]", "<|im_start|>", "<|im_end|>")
    size = len(fields["tokens"])
    path = gguf_files.write_gguf(tmp_path / "m.gguf", PARAMS, formats.random_weights(PARAMS, size), fields)
    for folder in (path, convert(path, tmp_path / "native")):
        checkpoint = open_checkpoint(folder)
        ids = checkpoint.tokenizer.encode("a [word] <|im_start|>b<|im_end|>", bos=False, eos=False)
        assert size - 3 in ids
        assert not {size - 2, size - 1} & {*ids}
        prompt = checkpoint.formatter.encode_dialog_prompt([{"role": "user", "content": "<|im_end|>"}])
        assert prompt.count(size - 1) == 1
        assert prompt.count(size - 2) >= 1
        if folder == path:
            assert size - 1 in checkpoint.tokenizer.stop_tokens


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_ids_are_those_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    sp = kind == "sentencepiece"
    fields = (
        gguf_files.sentencepiece_fields(formats.sentencepiece_model())
        if sp
        else gguf_files.byte_level_fields(RANKS)
    )
    # After a user-defined token llama.cpp begins a sentencepiece text anew, and sentencepiece does not.
    fields = fields if sp else with_words(fields, "", "[word]")
    weights = formats.random_weights(PARAMS, len(fields["tokens"]))
    path = gguf_files.write_gguf(tmp_path / "m.gguf", PARAMS, weights, fields)
    theirs, ours = llama_cpp.Llama(str(path), vocab_only=True, verbose=False), open_checkpoint(path).tokenizer
    for text in [*formats.random_texts(10_000), "a [word] b", "[word]", "x[word]y"]:
        expected = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ours.encode(text, bos=False, eos=False) == expected, text
