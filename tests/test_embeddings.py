"""Hidden states, embeddings and classes, against transformers in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification

from llama import Llama
from llama.errors import ArgumentError, CheckpointError, PromptError
from tests.support import formats

PARAMS = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
PARAMS |= {"rope_theta": 500000.0}
TEXTS = ["Hello there.", "A", "the weather in Ulm is as it always was, and will be", "ü 🦙"]


def build(folder: Path, **options: Any) -> Llama:
    return Llama.build(folder, max_seq_len=64, max_batch_size=2, dtype="float32", device="cpu", **options)


@pytest.fixture(scope="module", params=[False, True], ids=["layers", "whole steps"])
def pair(request, tmp_path_factory) -> tuple[Llama, Any]:
    folder = tmp_path_factory.mktemp("hf")
    theirs = formats.write_hf(folder, PARAMS, formats.random_weights(PARAMS, 400))
    formats.hf_tokenizer(folder)
    return build(folder, whole_steps=request.param), theirs.model


def states_of(theirs: Any, llama: Llama, text: str) -> tuple[torch.Tensor, ...]:
    ids = torch.tensor([llama.tokenizer.encode(text, bos=True, eos=False)])
    with torch.no_grad():
        return tuple(state[0] for state in theirs(ids, output_hidden_states=True).hidden_states)


def test_hidden_states_are_those_of_transformers(pair):
    llama, theirs = pair
    found = llama.hidden_states(TEXTS, layers=[0, 1, 2, 3])
    for text, states in zip(TEXTS, found, strict=True):
        expected = states_of(theirs, llama, text)
        for n, state in states.items():
            torch.testing.assert_close(state, expected[n], atol=2e-5, rtol=1e-5)
    (last,) = llama.hidden_states(TEXTS[:1])
    assert list(last) == [3]
    torch.testing.assert_close(last[3], found[0][3], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_embeddings_are_pooled_states(pair, pooling):
    llama, theirs = pair
    pool = {"mean": lambda x: x.mean(0), "last": lambda x: x[-1], "cls": lambda x: x[0]}[pooling]
    expected = torch.stack([pool(states_of(theirs, llama, text)[-1]) for text in TEXTS])
    plain = llama.embed(TEXTS, pooling=pooling, normalize=False)
    torch.testing.assert_close(plain, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(llama.embed(TEXTS, pooling), F.normalize(expected), atol=2e-5, rtol=1e-5)


def test_the_cache_is_left_alone_and_batches_may_be_large(pair, monkeypatch):
    llama, _ = pair
    before = llama.text_completion(["Hello there, how"], temperature=0, max_gen_len=4)
    cache = llama.model.cache.data.clone()
    together = llama.embed(TEXTS * 5)
    assert torch.equal(llama.model.cache.data, cache)
    monkeypatch.setattr("llama.embeddings.BATCH_TOKENS", 1)
    torch.testing.assert_close(llama.embed(TEXTS * 5), together, atol=1e-5, rtol=1e-5)
    assert llama.text_completion(["Hello there, how"], temperature=0, max_gen_len=4) == before


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, LlamaForSequenceClassification]:
    formats.write_hf(tmp_path, PARAMS, formats.random_weights(PARAMS, 400))
    formats.hf_tokenizer(tmp_path)
    config = LlamaConfig.from_pretrained(
        tmp_path, id2label={0: "good", 1: "bad", 2: "ugly"}, pad_token_id=399
    )
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config).eval()
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_classes_are_those_of_transformers(classifier):
    folder, theirs = classifier
    llama = build(folder)
    for text, found in zip(TEXTS, llama.classify(TEXTS), strict=True):
        ids = torch.tensor([llama.tokenizer.encode(text, bos=True, eos=False)])
        with torch.no_grad():
            logits = theirs(ids).logits[0]
        assert found["logits"] == pytest.approx(
            dict(zip(["good", "bad", "ugly"], logits.tolist(), strict=True)), abs=1e-5
        )
        assert found["label"] == theirs.config.id2label[logits.argmax().item()]


def test_a_head_that_does_not_fit_is_refused(classifier):
    folder, _ = classifier
    config = json.loads((folder / "config.json").read_text())
    for names in ({"0": "good", "1": "bad"}, {"0": "a", "1": "b", "5": "c"}, {str(i): "x" for i in range(4)}):
        (folder / "config.json").write_text(json.dumps({**config, "id2label": names}))
        with pytest.raises(CheckpointError, match="label"):
            build(folder)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda llama: llama.classify(["a"]), ArgumentError, "this checkpoint is not a classifier"),
        (lambda llama: llama.embed(["a"], pooling="max"), ArgumentError, "pooling must be"),
        (lambda llama: llama.hidden_states(["a"], layers=[4]), ArgumentError, "no layer 4"),
        (lambda llama: llama.embed(["word " * 80]), PromptError, "text 0 has .* max_seq_len=64"),
        (lambda llama: llama.embed([]), ArgumentError, "no texts"),
        (lambda llama: llama.embed("a"), ArgumentError, "texts must be a list"),
    ],
)
def test_what_does_not_fit_is_refused(pair, call, error, says):
    with pytest.raises(error, match=says):
        call(pair[0])
