"""Vision checkpoints: Meta's files and Hugging Face's, on any number of ranks."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama import Llama
from llama.backends.grouped import Grouped
from llama.backends.native import PackedMatrix, Widened
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.checkpoint.mllama import canvases
from llama.cli.info import as_text, inspect, memory
from llama.device import resident_bytes
from llama.errors import ArgumentError, CheckpointError
from llama.loading import load_weights
from llama.model import Transformer
from llama.parallel import ModelParallel
from llama.quantization import few_bits
from llama.vision import PlacedImage, VisionArgs, VisionModel, VisionTransformer, tile_image
from tests.support.quantized import KEPT, distance
from tests.support.vision import (
    IMAGE,
    PARAMS,
    picture,
    random_vision,
    reference,
    reference_logits,
    write_checkpoint,
)

TOKENS = torch.tensor([[9, 30, IMAGE, 400, 519, IMAGE, IMAGE, 7, 12, 99]])
IMAGES = [
    PlacedImage(position, tile_image(picture(*size), 56))
    for position, size in ((2, (100, 110)), (5, (40, 40)), (6, (56, 150)))
]


def logits(folder: Path, **options) -> Tensor:
    options = {"max_seq_len": 32, "max_batch_size": 2, "max_images": 3, "dtype": "float32", **options}
    with Llama.build(folder, **options) as llama:
        return llama.model(TOKENS, 0, [IMAGES])


def close(found: Tensor, model: VisionTransformer) -> None:
    torch.testing.assert_close(found, model(TOKENS, 0, [IMAGES]), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_one_file(vision_native, vision_model, tmp_path):
    close(logits(vision_native), vision_model)
    # As in the original/ folder of a Hugging Face repository.
    for name in ("params.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((vision_native / name).read_bytes())
    (tmp_path / "consolidated.pth").symlink_to(vision_native / "consolidated.00.pth")
    close(logits(tmp_path), vision_model)


@pytest.mark.slow
def test_eight_files(tmp_path):
    model = random_vision(n_heads=8, n_kv_heads=8)
    folder = write_checkpoint(tmp_path / "eight", model, 8)
    close(logits(folder), model)
    torch.testing.assert_close(
        open_checkpoint(folder).weights.read("learnable_embedding.weight"), model.learnable_embedding.weight
    )
    # Both ways, with another number of files.
    assert torch.equal(logits(convert(folder, tmp_path / "two", shards=2)), logits(folder))


@pytest.mark.slow
def test_a_file_that_lost_its_part_of_a_tensor_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "eight", random_vision(n_heads=8, n_kv_heads=8), 8)
    tensors = torch.load(folder / "consolidated.03.pth")
    del tensors["vision_model.vision_projection.bias"]
    torch.save(tensors, folder / "consolidated.03.pth")
    with pytest.raises(CheckpointError, match=r"vision_projection\.bias"):
        open_checkpoint(folder)


@pytest.mark.slow
def test_hugging_face_and_back(vision_hf, vision_native, vision_model, tmp_path):
    close(logits(vision_hf), vision_model)
    back = convert(vision_hf, tmp_path / "back")
    assert (
        json.loads((back / "params.json").read_text()).items()
        >= {
            name: value
            for name, value in json.loads((vision_native / "params.json").read_text()).items()
            if name not in ("multiple_of", "ffn_dim_multiplier")
        }.items()
    )
    seen = torch.zeros(4, 4, dtype=torch.bool)
    for rows, columns in canvases(4):
        seen[:rows, :columns] = True
    before, after = (torch.load(folder / "consolidated.00.pth") for folder in (vision_native, back))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        table = weight.shape[:2] == (4, 4)
        assert torch.equal(after[name][seen] if table else after[name], weight[seen] if table else weight)


@pytest.fixture(scope="module")
def hf(vision_hf):
    return reference(vision_hf)


@pytest.mark.parametrize(
    "prompt",
    [
        {0: (100, 50)},
        {3: (56, 150)},
        {1: (100, 110), 6: (40, 40)},
        {2: (100, 110), 5: (40, 40), 6: (56, 150)},  # consecutive ones too
    ],
    ids=["image first", "text, image", "two images", "three"],
)
def test_transformers_loads_it_and_agrees(hf, vision_model, prompt):
    tokens = [
        IMAGE if i in prompt else token for i, token in enumerate([9, 30, 8, 400, 519, 5, 6, 7, 12, 99])
    ]
    images = [PlacedImage(at, tile_image(picture(*size), 56)) for at, size in prompt.items()]
    expected = reference_logits(hf, tokens, [image for _, image in images])
    torch.testing.assert_close(
        vision_model(torch.tensor([tokens]), 0, [images]), expected, atol=1e-4, rtol=1e-4
    )


def test_folders_that_transformers_writes_load(vision_hf, vision_model, tmp_path):
    reference(vision_hf).save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).write_bytes((vision_hf / name).read_bytes())
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["vision_config"]["intermediate_layers_indices"] = [3, 7, 15, 23, 30]
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    close(logits(tmp_path / "saved"), vision_model)


def test_tables_that_differ_between_canvases_are_refused(vision_hf, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(vision_hf / "model.safetensors")
    tensors["vision_model.gated_positional_embedding.tile_embedding.weight"][3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    for path in vision_hf.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="differ between canvases"):
        logits(tmp_path)


@pytest.mark.parametrize(
    ("part", "key", "value"), [("vision_config", "hidden_act", "relu"), ("text_config", "hidden_act", "gelu")]
)
def test_a_config_of_another_model_is_refused(vision_hf, tmp_path, part, key, value):
    for path in vision_hf.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    config = json.loads((vision_hf / "config.json").read_text())
    config[part][key] = value
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{key}='{value}'"):
        open_checkpoint(tmp_path)


def test_the_encoder_loads_with_the_first_image(vision_native):
    with Llama.build(vision_native, max_seq_len=32, max_batch_size=2, max_images=3, dtype="float32") as llama:
        llama.generate([[1, 2, 3]], 2)
        assert not hasattr(llama.model, "vision_model")
        llama.model(TOKENS, 0, [IMAGES])
        assert not llama.model.vision_model.vision_projection.weight.is_meta


def test_without_vision_it_is_a_text_model(vision_native, vision_model):
    with Llama.build(vision_native, max_seq_len=32, max_batch_size=2, dtype="float32", vision=False) as llama:
        assert type(llama.model) is Transformer
        text = TOKENS.masked_fill(TOKENS == IMAGE, 5)
        torch.testing.assert_close(llama.model(text, 0), vision_model(text, 0))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "worst"), [("int8", 0.1), ("int4", 0.4)])
def test_fewer_bits(vision_native, vision_model, scheme, worst, tmp_path):
    exact = vision_model(TOKENS, 0, [IMAGES])
    found = logits(vision_native, quantize=scheme)
    assert distance(found, exact) < worst
    folder = convert(vision_native, tmp_path / scheme, quantize=scheme)
    torch.testing.assert_close(logits(folder), found, atol=0.02, rtol=0.02)


def products(model: torch.nn.Module) -> dict[str, type | None]:
    """How each linear layer of each part of a vision model is computed."""
    return {
        part: type(model.get_submodule(name).backend)
        for part, name in {
            "text": "layers.0.feed_forward.w2",
            "cross-attention": "cross_attention_layers.1.attention.wq",
            "encoder": "vision_model.vision_encoder.global_transformer.resblocks.7.mlp.c_fc",
            "projection": "vision_model.vision_projection",
        }.items()
    }


@pytest.mark.slow
def test_few_bits_are_kept_in_every_part(vision_native, vision_model, capsys, tmp_path):
    """On a CPU in a form for the compiled step, and for the encoder as on a GPU."""
    folder = convert(vision_native, tmp_path / "int8", quantize="int8")
    with Llama.build(folder, max_seq_len=32, max_batch_size=2, max_images=3, dtype="float32") as llama:
        assert "dequantized" not in capsys.readouterr().err
        found = llama.model(TOKENS, 0, [IMAGES])
        step, image = [PackedMatrix, PackedMatrix], [Widened, Widened]
        assert [*products(llama.model).values()] == step + image
        assert type(llama.model.cross_attention_layers[0].attention.wv.backend) is Widened
        resident = resident_bytes(llama.model)
        text = memory(llama.model.params, 1, open_checkpoint(folder).weights, torch.float32, "int8")[0]
        assert 0.95 < resident / text < 1.01  # tiles are padded to whole ones
    with torch.device("meta"):
        kept = VisionTransformer(VisionArgs(**vars(vision_model.params)))
    load_weights(kept, open_checkpoint(folder).weights, KEPT, vision_model.device, torch.float32, "int8")
    assert set(products(kept).values()) == {Grouped}
    assert resident_bytes(kept) < 1.2 * resident
    assert distance(found, kept(TOKENS, 0, [IMAGES])) < 0.03  # of activations in 8 bits


@pytest.mark.slow
def test_packed_weights(vision_native, vision_model):
    assert distance(logits(vision_native, dtype="bfloat16"), vision_model(TOKENS, 0, [IMAGES])) < 0.1


def test_info_tells_what_images_take(vision_native, vision_model):
    lines = as_text(inspect(vision_native, max_images=2, dtype="float32"))
    assert "Llama 3.2 Vision" in lines
    assert f"{sum(weight.numel() for weight in vision_model.parameters()):,}" in lines
    assert "up to 4 tiles of 56 × 56, encoder dim 64, 40 layers" in lines
    assert "max_images 2" in lines
    assert "one image" in lines


def test_an_image_takes_the_memory_that_info_tells():
    """The encoder in the released proportions, less its width and depth."""
    args = VisionArgs(**PARAMS | {"vision_chunk_size": 224}, vision_dim=160, vision_heads=2)
    args.vision_layers, args.vision_taps, args.vision_global_layers = 6, (1, 2, 3, 4, 5), 1
    tower = VisionModel(args, ModelParallel())
    for weight in tower.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    pixels = torch.zeros(4, 3, 224, 224)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        tower.vision_projection(tower.vision_encoder(pixels, 2, 2))
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert 0.9 < max(itertools.accumulate(sizes)) / (args.activations * 4) <= 1


RELEASED = {"vocab_size": 128256, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8}
SMALL = {**RELEASED, "dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024}
LARGE = {**RELEASED, "dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096}


def shapes_of(**args) -> tuple[VisionTransformer, dict[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = VisionTransformer(VisionArgs(**args), ModelParallel())
    return model, {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("args", "count"),
    [
        (SMALL, 10_629_184_035),
        (SMALL | {"vision_chunk_size": 448}, 10_616_650_275),  # the base model of 11B
        pytest.param(
            LARGE | {"vision_num_cross_attention_layers": 20}, 88_552_318_523, marks=pytest.mark.slow
        ),
    ],
    ids=["11B", "11B base", "90B"],
)
def test_the_released_models_have_their_number_of_weights(args, count):
    assert sum(map(math.prod, shapes_of(**args)[1].values())) == count


@pytest.mark.slow
def test_four_bits_of_the_11b_fit_a_card_of_12_gb():
    """With the cache of a chat about one image."""
    model, shapes = shapes_of(**SMALL, max_batch_size=1, max_seq_len=4096)
    bits = {name: few_bits("int4", name) or 16 for name in shapes}
    # A group of 32 has a scale of 16 bits, and in 4 bits a minimum too.
    stored = {4: 4 + 32 / 32, 8: 8 + 16 / 32, 16: 16}
    weights = sum(math.prod(shape) * stored[bits[name]] / 8 for name, shape in shapes.items())
    caches = 2 * (math.prod(model.cache_shape()) + math.prod(model.image_cache_shape()))
    assert weights + caches + 2 * model.params.activations < 12e9


@pytest.mark.parametrize("count", [7, 9])
def test_cross_attention_that_cannot_be_spaced_evenly_is_refused(count):
    with pytest.raises(ArgumentError, match=f"vision_num_cross_attention_layers={count}"):
        VisionArgs(**PARAMS | {"n_layers": 10, "vision_num_cross_attention_layers": count})


SCRIPT = """
import sys
import torch
from llama import Llama
from llama.backends.grouped import Grouped
from llama.backends.native import PackedMatrix, Widened

torch.set_num_threads(1)
tokens, images = torch.load(sys.argv[1], weights_only=False)
found = []
for folder in sys.argv[3:]:
    with Llama.build(folder, max_seq_len=32, max_batch_size=2, max_images=3, dtype="float32") as llama:
        found.append(llama.model(tokens, 0, [images]))
torch.save(found, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks(vision_native, vision_hf, vision_model, on_ranks, tmp_path, size):
    (tmp_path / "script.py").write_text(SCRIPT)
    torch.save((TOKENS, IMAGES), tmp_path / "in")
    files = [tmp_path / name for name in ("script.py", "in", "out")]
    done = on_ranks(size, *files, vision_native, vision_hf)
    assert done.returncode == 0, done.stderr
    for found in torch.load(tmp_path / "out"):
        close(found, vision_model)
