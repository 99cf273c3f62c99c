"""Images on several ranks, on gloo: what one rank gives."""

from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.checkpoint.convert import convert
from tests.support import vision_ranks
from tests.support.quantized import distance
from tests.support.vision import picture, random_vision, write_checkpoint
from tests.support.vision_ranks import MODULE, SIZES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed, (name, size) in enumerate(SIZES.items()):
        picture(*size, seed).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_chats_about_images_are_the_same(vision_native, images, on_ranks, tmp_path, size):
    done = on_ranks(size, *MODULE, "talking", vision_native, images, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    with Llama.build(vision_native, **vision_ranks.BUILD) as llama:
        expected = vision_ranks.talk(llama, images)
    texts = [answer["generation"]["content"] for answer in expected["greedy"]]
    assert len({*texts}) == len(texts)  # or nothing would be shown
    once, before, after = expected["encoded"]
    assert (once, after) == (3, before)  # each picture once for all answers, and never again for next turns
    for index, reused in expected["reused"]:
        assert reused >= expected["prompts"][index] - 1
    for rank in range(size):
        found = torch.load(f"{tmp_path}/out.{rank}")
        for kind in ("greedy", "sampled", "first"):
            for ours, theirs in zip(found.pop(kind), expected[kind], strict=True):
                assert ours.pop("logprobs") == pytest.approx(theirs["logprobs"], abs=1e-4)
                assert ours == {name: value for name, value in theirs.items() if name != "logprobs"}
        assert found == {kind: expected[kind] for kind in found}


@pytest.mark.parametrize("scheme", ["int4", pytest.param("int8", marks=pytest.mark.soak)])
def test_fewer_bits_are_the_same_on_two_ranks(vision_native, images, on_ranks, tmp_path, scheme):
    """Quantized as they load, and from a folder, of which a rank reads its part."""
    folder = convert(vision_native, tmp_path / scheme, quantize=scheme, shards=3)
    jobs = f"{vision_native},{vision_native}:{scheme},{folder}"
    done = on_ranks(2, *MODULE, "seeing", images, tmp_path / "out", jobs)
    assert done.returncode == 0, done.stderr
    expected = [vision_ranks.job(text, images) for text in jobs.split(",")[1:]]
    for rank in range(2):
        exact, *found = torch.load(f"{tmp_path}/out.{rank}")
        assert distance(found[0], exact) > 0.005  # they are quantized
        for ours, theirs in zip(found, expected, strict=True):
            assert distance(ours, theirs) < 0.01  # of activations in 8 bits


@pytest.mark.soak
def test_ranks_without_a_head_of_the_encoder(images, on_ranks, tmp_path):
    """As of 32 ranks half are, since the encoder has 16 heads."""
    model = random_vision(vision_heads=2)
    folder = write_checkpoint(tmp_path / "two heads", model)
    done = on_ranks(
        4, *MODULE, "seeing", images, tmp_path / "out", f"{folder},{folder}::bfloat16,{folder}:int8"
    )
    assert done.returncode == 0, done.stderr
    expected = vision_ranks.job(str(folder), images)
    for rank in range(4):
        exact, *rounded = torch.load(f"{tmp_path}/out.{rank}")
        torch.testing.assert_close(exact, expected, atol=1e-4, rtol=1e-4)
        assert all(distance(found, expected) < 0.1 for found in rounded)
