"""Draws that rounding cannot move: the same text alone, in batches, and on any number of ranks.

The weights are random and small, so the distributions are flat: over a cumulative sum, a difference
of one part in a million would pick another token now and then.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from llama import ranks
from llama.engine import Engine, Request
from llama.model import ModelArgs, Transformer
from llama.parallel import Sharded
from llama.sampling import SamplingParams
from tests.support.tiny import small_model

NEW = 32


def part_of(whole: Transformer) -> Transformer:
    """This rank's part of a model."""
    model = Transformer(ModelArgs(**vars(whole.params)), ranks.current())
    model.load_state_dict({**whole.state_dict(), **sharded(whole, model)})
    return model


def sharded(whole: Transformer, model: Transformer) -> dict[str, torch.Tensor]:
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, Sharded):
            weight = whole.get_parameter(f"{name}.weight")
            pieces = [weight.narrow(module.dim, a, b - a) for a, b in module.spans]
            parts[f"{name}.weight"] = torch.cat(pieces, module.dim)
    return parts


def texts(model: Transformer, count: int) -> list[list[int]]:
    """What `count` requests generate, as many at a time as there are slots."""
    engine = Engine(model)
    generator = torch.Generator().manual_seed(4)
    requests: list[Request] = []
    for i in range(count):
        params = SamplingParams(
            temperature=0.8 + 0.1 * (i % 8),
            top_p=(0.9, 1.0, 0.95)[i % 3],
            top_k=(None, None, 50, 2000)[i % 4],
            min_p=(0, 0.01)[i % 5 == 0],
            seed=i,
            max_tokens=NEW,
        )
        length = int(torch.randint(1, 20, (), generator=generator))
        prompt = torch.randint(model.params.vocab_size, (length,), generator=generator).tolist()
        requests.append(engine.add(prompt, params))
    for _ in engine.run(requests):
        pass
    return [request.tokens for request in requests]


def flat_model(vocab_size: int, slots: int) -> Transformer:
    return small_model(std=0.1, vocab_size=vocab_size, max_batch_size=slots, dim=64)


def check(vocab_size: int, count: int, folder: Path, on_ranks) -> None:
    alone = texts(flat_model(vocab_size, 1), count)
    assert all(len(tokens) == NEW for tokens in alone)
    assert len({token for tokens in alone for token in tokens}) > 15 * count  # hardly any came twice
    assert texts(flat_model(vocab_size, 8), count) == alone
    for nproc in (2, 4):
        done = on_ranks(nproc, "-m", __name__, vocab_size, count, folder, timeout=600)
        assert done.returncode == 0, done.stderr
        for rank in range(nproc):
            assert json.loads((folder / f"{nproc}.{rank}.json").read_text()) == alone


@pytest.mark.parametrize(
    ("vocab_size", "count"),
    [
        pytest.param(8192, 10, marks=pytest.mark.slow),
        pytest.param(128_256, 200, marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
    ],
)
def test_requests_are_the_same_alone_in_batches_and_on_ranks(
    vocab_size: int, count: int, tmp_path: Path, on_ranks
) -> None:
    check(vocab_size, count, tmp_path, on_ranks)


@pytest.mark.slow
def test_with_the_vocabulary_of_llama_3_in_a_batch() -> None:
    assert texts(flat_model(128_256, 4), 4) == texts(flat_model(128_256, 1), 4)


def one_rank(vocab_size: int, count: int, folder: Path) -> None:
    whole = flat_model(vocab_size, 8)  # before there is a group that it would be cut across
    group = ranks.connect(None, torch.device("cpu"))
    found = texts(part_of(whole), count)
    (folder / f"{group.size}.{group.rank}.json").write_text(json.dumps(found))
    ranks.disconnect()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
