"""Several ranks, on gloo: the same answers as one, and one word when something breaks."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.parallel import Joined, ModelParallel, merged
from tests.support import ROOT, tiny
from tests.support.ranks import PROMPTS, in_shape, observe
from tests.support.tiny import small_model

MODULE = ["-m", "tests.support.ranks"]


def checkpoints(folder: Path) -> Path:
    """Every way of cutting one model, and models whose shape does not divide evenly."""
    for count in (1, 2, 4, 8):
        tiny.write_checkpoint(folder / f"{count} shards", count)
    tiny.write_checkpoint(folder / "Llama 2", 2, cut={**tiny.CUT, "tok_embeddings": 1})
    tiny.write_checkpoint(folder / "tied", 4, tied=True)
    tiny.write_checkpoint(folder / "one key head", n_kv_heads=1)
    tiny.write_checkpoint(folder / "two key heads", 2, n_kv_heads=2)
    tiny.write_checkpoint(
        folder / "uneven", multiple_of=1, ffn_dim_multiplier=0.99
    )  # 168 features on 4 ranks
    return folder


@pytest.mark.slow
def test_answers_in_a_shape_are_the_same_on_two_ranks(ckpt: Path, tmp_path: Path, on_ranks) -> None:
    done = on_ranks(2, *MODULE, "shapes", ckpt, tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    expected = in_shape(Llama.build(ckpt, max_seq_len=1024, max_batch_size=3, dtype="float32"))
    for rank in range(2):
        seen = torch.load(tmp_path / f"seen.{rank}")
        assert seen["schema"] == expected["schema"] and seen["call"] == expected["call"]
        torch.testing.assert_close(seen["vectors"], expected["vectors"], atol=1e-5, rtol=1e-5)
    (answer,) = expected["call"]
    assert answer["finish_reason"] == "tool_calls"


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_any_shards_on_any_ranks_give_what_one_rank_gives(tmp_path: Path, on_ranks, nproc: int) -> None:
    folders = checkpoints(tmp_path / "ckpts")
    done = on_ranks(nproc, *MODULE, "every_checkpoint", folders, tmp_path)
    assert done.returncode == 0, done.stderr
    for folder in folders.iterdir():
        expected = observe(Llama.build(folder, max_seq_len=32, max_batch_size=3, dtype="float32"))
        for rank in range(nproc):
            seen = torch.load(tmp_path / f"{rank}.pt")[folder.name]
            torch.testing.assert_close(seen["logits"], expected["logits"], atol=1e-4, rtol=1e-5)
            assert seen["greedy"] == expected["greedy"], folder.name
            assert seen["sampled"] == expected["sampled"], folder.name
            for ours, theirs in zip(seen["logprobs"], expected["logprobs"], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_two_models_under_two_ranks(ckpt: Path, tmp_path: Path, torchrun) -> None:
    done = torchrun(2, *MODULE, "two_at_once", ckpt, tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "only rank 0 prints\n"
    expected = observe(Llama.build(ckpt, max_seq_len=32, max_batch_size=3, dtype="float32"))
    for rank in range(2):
        assert torch.load(tmp_path / f"seen.{rank}")["greedy"] == expected["greedy"]


@pytest.mark.slow
def test_a_slow_rank_does_not_break_the_next_group(ckpt: Path, tmp_path: Path, on_ranks) -> None:
    """Without torchrun's own store: a rank meets the others on the one that rank 0 serves."""
    done = on_ranks(2, *MODULE, "one_after_another", ckpt, tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    expected = observe(Llama.build(ckpt, max_seq_len=32, max_batch_size=3, dtype="float32"))
    for rank in range(2):
        assert torch.load(tmp_path / f"seen.{rank}")["greedy"] == expected["greedy"]


@pytest.mark.slow
def test_copies_of_a_model_work_apart(ckpt: Path, tmp_path: Path, on_ranks) -> None:
    done = on_ranks(4, *MODULE, "replicas", ckpt, tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    llama = Llama.build(ckpt, max_seq_len=32, max_batch_size=3, dtype="float32")
    for rank in range(4):
        expected = llama.generate([PROMPTS[rank // 2]], 12, temperature=0)[0]
        assert torch.load(tmp_path / f"seen.{rank}") == expected


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith(("error:", "[rank"))]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_with_one_message(ckpt: Path, torchrun, rank: int) -> None:
    done = torchrun(3 - rank, *MODULE, "die", tiny_for(ckpt), rank, timeout=60)
    assert done.returncode != 0
    assert len(said := errors(done)) == 1, done.stderr
    assert "another rank" in said[0]


def tiny_for(ckpt: Path) -> Path:
    """With heads for two ranks and for three."""
    return tiny.write_checkpoint(ckpt.with_name("six"), dim=96, n_heads=6, n_kv_heads=3)


@pytest.mark.slow
def test_a_fault_on_one_rank_is_said_once_and_ends_all(ckpt: Path, torchrun) -> None:
    done = torchrun(2, *MODULE, "one_bad_folder", ckpt, timeout=60)
    assert done.returncode != 0
    assert len(said := errors(done)) == 1, done.stderr
    assert "tiny-missing" in said[0]


@pytest.mark.slow
def test_too_many_ranks_are_told_which_numbers_fit(ckpt: Path, torchrun) -> None:
    done = torchrun(3, *MODULE, "every_checkpoint", ckpt.parent, ckpt, timeout=60)
    assert done.returncode != 0
    refusal = "error: 8 attention heads do not divide evenly among 3 ranks; use one of [1, 2, 4, 8]"
    assert errors(done) == [refusal]


@pytest.mark.slow
def test_two_nodes(tmp_path: Path, torchrun) -> None:
    """Two agents on loopback, each with two ranks, share one model."""
    tiny.write_checkpoint(tmp_path / "ckpts" / "a", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"),
                *("--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)),
                *(*MODULE, "every_checkpoint", str(tmp_path / "ckpts"), str(tmp_path)),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(2)
    ]
    try:
        assert [agent.wait(120) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.send_signal(signal.SIGTERM)
    alone = Llama.build(tmp_path / "ckpts" / "a", max_seq_len=32, max_batch_size=3, dtype="float32")
    expected = observe(alone)
    for rank in range(4):
        assert torch.load(tmp_path / f"{rank}.pt")["a"]["greedy"] == expected["greedy"]


def test_joined_matrices_compute_the_same_and_stay_views_of_one() -> None:
    """What CUDA does with wq, wk and wv, and with w1 and w3."""
    model = small_model()
    tokens = torch.randint(64, (2, 9))
    before, state = model(tokens, 0), {name: w.clone() for name, w in model.state_dict().items()}
    joined = [module for module in model.modules() if isinstance(module, Joined)]
    for module in joined:
        module.join()
    torch.testing.assert_close(model(tokens, 0), before, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == state.keys()
    assert all(weight.equal(state[name]) for name, weight in model.state_dict().items())
    for module in joined:
        assert module.weight is not None
        assert {part.weight.untyped_storage().data_ptr() for part in module.parts} == {
            module.weight.untyped_storage().data_ptr()
        }
    model.layers[0].attention.wk.weight.mul_(2)  # an edit of a part is one of the whole
    other = small_model()
    other.layers[0].attention.wk.weight.mul_(2)
    torch.testing.assert_close(model(tokens, 0), other(tokens, 0), atol=1e-5, rtol=1e-5)


def test_spans_cover_everything_once() -> None:
    for n, size in ((8, 1), (8, 4), (11, 4), (3, 5)):
        spans = [ModelParallel(rank, size).span(n) for rank in range(size)]
        assert [i for a, b in spans for i in range(a, b)] == list(range(n))
    assert merged([(0, 2), (2, 4), (2, 4), (4, 6)]) == [(0, 4), (2, 6)]
