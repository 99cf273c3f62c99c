"""LoRA adapters on vision models, against peft's merge into transformers' model and against one by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.errors import CheckpointError
from llama.vision import PlacedImage, tile_image
from tests.support import vision_ranks
from tests.support.lora import train
from tests.support.quantized import distance
from tests.support.vision import (
    IMAGE,
    picture,
    reference,
    reference_logits,
)

PICTURE = tile_image(picture(100, 50), 56)
TOKENS = [9, IMAGE, 30, 400, 519]
EVERYWHERE = {}  # what these names match: layers of text, cross-attention, and the image encoder
TEXT = {"target_modules": r".*language_model.*\.(self_attn\.[qkvo]_proj|(gate|up|down)_proj|lm_head)"}
CROSS = {"target_modules": r".*cross_attn\.[qkvo]_proj", "use_rslora": True}
TOWER = {"target_modules": r".*(vision_model.*(q_proj|o_proj|fc1|fc2)|multi_modal_projector)"}


def logits(folder: Path, adapter: Path | None) -> Tensor:
    options = {"max_seq_len": 32, "max_batch_size": 1, "dtype": "float32", "adapter": adapter}
    with Llama.build(folder, **options) as llama:
        return llama.model(torch.tensor([TOKENS]), 0, [[PlacedImage(1, PICTURE)]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [EVERYWHERE, TEXT, CROSS, TOWER], ids=["everywhere", "text", "cross", "tower"]
)
def test_logits_are_those_of_peft(config, vision_native, vision_hf, tmp_path):
    before = logits(vision_native, None)
    merged = train(tmp_path / "adapter", reference(vision_hf), **config)
    expected = reference_logits(merged, TOKENS, [PICTURE])
    assert (expected - before).abs().max() > 0.01
    for folder in (vision_native, vision_hf):
        torch.testing.assert_close(logits(folder, tmp_path / "adapter"), expected, atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def adapter(vision_hf, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    train(folder, reference(vision_hf), target_modules=r".*(self|cross)_attn\.(q|v)_proj", use_rslora=True)
    return folder


@pytest.mark.slow
def test_weights_are_those_merged_by_hand(adapter, vision_native):
    """W + alpha / √r · B A; layer 3 of transformers is the first block of cross-attention."""
    factors = load_file(adapter / "adapter_model.safetensors")
    before, after = (open_checkpoint(vision_native, adapter=path).weights for path in (None, adapter))
    for name, module in {
        "layers.0.attention.wv.weight": "model.language_model.layers.0.self_attn.v_proj",
        "layers.4.attention.wv.weight": "model.language_model.layers.5.self_attn.v_proj",
        "cross_attention_layers.0.attention.wq.weight": "model.language_model.layers.3.cross_attn.q_proj",
        "cross_attention_layers.1.attention.wv.weight": "model.language_model.layers.8.cross_attn.v_proj",
        "vision_model.vision_encoder.transformer.resblocks.31.attn.wq.weight": (
            "model.vision_model.transformer.layers.31.self_attn.q_proj"
        ),
    }.items():
        a, b = (factors[f"base_model.model.{module}.lora_{which}.weight"] for which in "AB")
        torch.testing.assert_close(after.read(name), before.read(name) + 8 / 4**0.5 * b @ a)
    assert torch.equal(
        after.read("layers.0.attention.wo.weight"), before.read("layers.0.attention.wo.weight")
    )


@pytest.mark.slow
def test_names_of_older_versions(adapter, vision_native, tmp_path):
    """Before 4.52, transformers had the names of its files in memory too."""
    factors = load_file(adapter / "adapter_model.safetensors")
    old = {"model.model.language_model.": "model.language_model.model.", "model.model.vision": "model.vision"}
    renamed = {}
    for name, factor in factors.items():
        new, before = next((new, before) for before, new in old.items() if before in name)
        renamed[name.replace(before, new)] = factor
    assert not renamed.keys() & factors.keys()
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    assert torch.equal(logits(vision_native, tmp_path), logits(vision_native, adapter))


@pytest.mark.slow
def test_without_images_the_text_layers_are_adapted(adapter, vision_native):
    text = torch.tensor([[5, 9, 30, 400, 519]])
    options = {"max_seq_len": 32, "max_batch_size": 1, "dtype": "float32", "adapter": adapter}
    with (
        Llama.build(vision_native, **options) as llama,
        Llama.build(vision_native, vision=False, **options) as blind,
    ):
        torch.testing.assert_close(blind.model(text, 0), llama.model(text, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"target_modules": ["embed_tokens"]}, "last rows belong to images"),
        ({"target_modules": ["patch_embedding"]}, "a LoRA factor must be a matrix"),
    ],
)
def test_other_layers_are_refused(config, sentence, vision_native, vision_hf, tmp_path):
    train(tmp_path, reference(vision_hf), **config)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(vision_native, adapter=tmp_path)


@pytest.mark.slow
def test_ranks_read_their_parts(adapter, vision_native, on_ranks, tmp_path):
    for name, size in vision_ranks.SIZES.items():
        picture(*size).save(tmp_path / f"{name}.png")
    jobs = [f"{vision_native}:::{adapter}", f"{vision_native}:int8::{adapter}"]
    done = on_ranks(2, *vision_ranks.MODULE, "seeing", tmp_path, tmp_path / "out", ",".join(jobs))
    assert done.returncode == 0, done.stderr
    for job, found in zip(jobs, torch.load(f"{tmp_path}/out.0"), strict=True):
        # Activations have 8 bits too where weights do.
        assert distance(found, vision_ranks.job(job, tmp_path)) < (0.01 if "int8" in job else 1e-5)
