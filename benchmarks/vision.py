"""Time to first token with an image, decode, and memory: this runtime compared with transformers.

    python benchmarks/vision.py [--depth 4] [--new 16] [--side 1120] [--out benchmarks/results/vision.md]

The model has Llama 3.2 11B Vision's widths and part of its depth (one layer in `depth` of text,
cross-attention and image encoder), with random bf16 weights. Each of the two runs in its own process, reads
one square image (1120 pixels fill 4 tiles, 560 pixels one) and 32 tokens of text, and continues greedily.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from harness import in_process, machine, markdown
from PIL import Image
from torch import Tensor

from llama import backends
from llama.checkpoint.mllama import mllama_config
from llama.checkpoint.source import whole_parts
from llama.engine import Engine
from llama.loading import load_weights
from llama.parallel import ModelParallel, Span
from llama.sampling import SamplingParams
from llama.vision import VisionArgs, VisionTransformer, tile_image


def picture(side: int) -> Image.Image:
    return Image.radial_gradient("L").resize((side, side)).convert("RGB")


def arguments(depth: int, new: int) -> VisionArgs:
    layers = 32 // depth
    return VisionArgs(
        dim=4096,
        n_layers=32 // depth,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=128256,
        multiple_of=1024,
        ffn_dim_multiplier=1.3,
        use_scaled_rope=True,
        max_batch_size=1,
        max_seq_len=64 + new,
        vision_num_cross_attention_layers=8 // depth,
        vision_layers=layers,
        vision_global_layers=8 // depth,
        vision_taps=tuple(sorted({3 * layers // 32, 7 * layers // 32, layers // 2, layers - 2, layers - 1})),
    )


class Noise:
    """Random weights as a `TensorSource`: one block of numbers, repeated."""

    dtype = torch.bfloat16

    def __init__(self, args: VisionArgs) -> None:
        self.shapes = {name: part.shape for name, part in whole_parts(args).items()}
        self.block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02

    def read(self, name: str, dim: int = 0, span: Span | None = None) -> Tensor:
        weight = fill(torch.empty(self.shapes[name], dtype=self.dtype), self.block)
        return weight if span is None else weight.narrow(dim, span[0], span[1] - span[0])

    def release(self) -> None:
        pass


def fill(weight: Tensor, block: Tensor) -> Tensor:
    flat = weight.view(-1)
    for part in flat.split(len(block)):
        part.copy_(block[: len(part)])
    return weight


def prompt(args: VisionArgs) -> list[int]:
    return [128000, args.vocab_size, *range(1000, 1032)]


def measure(ticks: list[float], new: int) -> dict[str, float]:
    return {
        "first token, s": ticks[1] - ticks[0],
        "tokens/s": (new - 1) / (ticks[-1] - ticks[1]),
        "memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def ours(args: VisionArgs, new: int, side: int) -> dict[str, float]:
    device, dtype = torch.device("cpu"), torch.bfloat16
    with torch.device("meta"):
        model = VisionTransformer(args, ModelParallel())
    plan = backends.plan(model, device, dtype)
    tower = model.vision_model
    del model.vision_model
    source = Noise(args)
    load_weights(model, source, plan, device, dtype)
    load_weights(tower, source, plan, device, dtype, prefix="vision_model.")
    model.vision_model = tower
    model.allocate_cache()
    engine = Engine(model)
    params = SamplingParams(temperature=0, max_tokens=new)
    for _ in engine.run([engine.add(prompt(args)[2:], SamplingParams(temperature=0, max_tokens=2))]):
        pass
    ticks = [time.perf_counter()]
    images = [tile_image(picture(side), args.vision_chunk_size)]
    for event in engine.run([engine.add(prompt(args), params, images=images)]):
        if event.token is not None:
            ticks.append(time.perf_counter())
    return measure(ticks, new)


def theirs(args: VisionArgs, new: int, side: int) -> dict[str, float]:
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.generation.streamers import BaseStreamer
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    text = {
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "eos_token_id": None,
        "pad_token_id": 128004,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
    }
    block = Noise(args).block
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(
            MllamaConfig(**json.loads(json.dumps(mllama_config(args, text))))
        ).bfloat16()
    model = model.to_empty(device="cpu").eval()
    for weight in model.parameters():
        fill(weight.data, block)
    for module in model.modules():  # buffers that are computed, not stored
        if hasattr(module, "inv_freq"):
            module.inv_freq = (args.rope_theta ** -(torch.arange(0, 128, 2) / 128)).float()

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.ticks: list[float] = []

        def put(self, value: Any) -> None:
            self.ticks.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.tensor([prompt(args)])
    model.generate(ids[:, 2:], attention_mask=torch.ones_like(ids[:, 2:]), max_new_tokens=2, do_sample=False)
    clock, began = Clock(), time.perf_counter()
    processor = MllamaImageProcessorPil(size={"height": 560, "width": 560}, max_image_tiles=4)
    found = processor([picture(side)], return_tensors="pt")
    mask = torch.zeros(1, ids.shape[1], 1, 4, dtype=torch.int64)
    mask[:, 1:, :, : int(found["aspect_ratio_mask"].sum())] = 1
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=found["pixel_values"].bfloat16(),
        aspect_ratio_ids=found["aspect_ratio_ids"],
        aspect_ratio_mask=found["aspect_ratio_mask"],
        cross_attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        streamer=clock,
    )
    return measure([began, *clock.ticks[1:]], new)  # the first item is the prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--depth", type=int, default=4, help="keep one layer in this many")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate")
    parser.add_argument("--side", type=int, default=1120, help="of the image, in pixels")
    parser.add_argument("--out", type=Path, help="where to write the table")
    parser.add_argument("--which", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    args = arguments(options.depth, options.new)
    if options.which:
        with torch.inference_mode():
            print(
                json.dumps({"ours": ours, "theirs": theirs}[options.which](args, options.new, options.side))
            )
        return
    found = {name: in_process("--which", name) for name in ("ours", "theirs")}
    parameters = sum(torch.Size(part.shape).numel() for part in whole_parts(args).values())
    head = ["", *found["ours"]]
    labels = {"ours": "this runtime", "theirs": "transformers"}
    side = f"an image of {options.side} × {options.side} pixels"
    table = f"{parameters / 1e9:.2f}B parameters, bf16, {side}; {machine()}\n\n"
    table += markdown(head, [[labels[name], *values.values()] for name, values in found.items() if values])
    print(table)
    if options.out:
        options.out.write_text(table + "\n", "utf-8")


if __name__ == "__main__":
    main()
