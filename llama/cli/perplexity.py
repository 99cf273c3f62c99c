"""How well a model predicts a text, which shows the cost of quantization."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from llama.cli.options import BuildOptions
from llama.errors import ArgumentError
from llama.generation import Llama


def perplexity(
    ckpt_dir: str,
    file: str,
    *,
    stride: int | None = None,
    build: BuildOptions = BuildOptions(max_seq_len=1024),
) -> None:
    """Print the mean negative log-likelihood (NLL) and the perplexity of a text's tokens.

    Args:
        ckpt_dir: folder of a checkpoint, a GGUF file, a URL, or a Hugging Face repository
        file: a UTF-8 text file
        stride: tokens from one window of max_seq_len to the next; by default half a window
    """
    text = Path(file).read_text("utf-8")
    with build.build(ckpt_dir) as llama:
        tokens = llama.tokenizer.encode(text, bos=True, eos=False)
        scores = negative_log_likelihoods(llama, tokens, stride or max(1, build.max_seq_len // 2))
    nll = math.fsum(scores) / len(scores)
    print(
        f"NLL {nll:.4f} nats per token, perplexity {math.exp(nll):.3f}, {len(scores):,} tokens scored in "
        f"windows of {build.max_seq_len}"
    )


def negative_log_likelihoods(llama: Llama, tokens: Sequence[int], stride: int) -> list[float]:
    """-log p of every token but the first, each scored once, given the tokens before it in its window.

    The windows are max_seq_len long and start `stride` apart, so from the second window on every token
    has at least max_seq_len - stride tokens before it. Raises ValueError if there is nothing to score.
    """
    length = llama.model.params.max_seq_len
    if len(tokens) < 2:
        raise ArgumentError(f"the text has {len(tokens)} token(s): scoring needs at least two")
    if not 1 <= stride < length:
        raise ArgumentError(f"stride={stride} must be 1 or more, and less than max_seq_len={length}")
    scores: list[float] = []
    for start, stop, scored in tqdm(
        list(windows(len(tokens), length, stride)), "Scoring", leave=False, disable=None
    ):
        logprobs = llama.generate([tokens[start:stop]], 0, logprobs=True, echo=True)[1]
        assert logprobs is not None
        scores += [-logprob for logprob in logprobs[0][scored - start :]]
    return scores


def windows(n: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored token) of the windows that score tokens 1 … n - 1 once each."""
    scored, start = 1, 0
    while scored < n:
        stop = min(start + length, n)
        yield start, stop, scored
        scored, start = stop, start + stride
