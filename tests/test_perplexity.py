"""Likelihoods of a text: every token once, by what stands before it."""

import math
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.cli.options import BuildOptions
from llama.cli.perplexity import negative_log_likelihoods, perplexity, windows
from tests.support import tiny


@pytest.mark.parametrize(("n", "length", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 3), (50, 8, 7)])
def test_windows_score_every_token_once_with_enough_before_it(n: int, length: int, stride: int) -> None:
    scored = []
    for start, stop, first in windows(n, length, stride):
        assert 0 <= start < first < stop <= min(n, start + length)
        assert start == 0 or first - start >= length - stride
        scored += range(first, stop)
    assert scored == list(range(1, n))


@pytest.fixture
def llama(ckpt: Path) -> Llama:
    return Llama.build(ckpt, max_seq_len=16, max_batch_size=1, dtype="float32")


def test_scores_are_those_of_the_model(llama: Llama) -> None:
    tokens = torch.randint(0, tiny.VOCAB, (30,))
    found = negative_log_likelihoods(llama, tokens.tolist(), 10)
    expected = []
    for start, first in [(0, 1), (10, 16), (20, 26)]:
        logprobs = llama.model(tokens[None, start : start + 16], 0)[0].log_softmax(-1)
        following = tokens[first : start + 16]
        expected += [-logprobs[first - start - 1 + i, token].item() for i, token in enumerate(following)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)


def test_refusals_are_sentences(llama: Llama) -> None:
    with pytest.raises(ValueError, match="the text has 1 token"):
        negative_log_likelihoods(llama, [1], 8)
    for stride in (0, 16):
        with pytest.raises(ValueError, match=f"stride={stride} must be 1 or more, and less than max_seq_len"):
            negative_log_likelihoods(llama, [1, 2, 3], stride)


def test_the_command_prints_the_mean(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text"
    text.write_text("the llama and the other llama", "utf-8")
    perplexity(str(ckpt), str(text), build=BuildOptions(max_seq_len=32, dtype="float32"))
    with Llama.build(ckpt, max_seq_len=32, max_batch_size=1, dtype="float32") as llama:
        ids = llama.tokenizer.encode(text.read_text(), bos=True, eos=False)
        scores = llama.generate([ids], 0, logprobs=True, echo=True)[1][0][1:]
    nll = -sum(scores) / len(scores)
    expected = f"NLL {nll:.4f} nats per token, perplexity {math.exp(nll):.3f}, {len(scores)} tokens scored"
    assert capsys.readouterr().out.startswith(expected)
