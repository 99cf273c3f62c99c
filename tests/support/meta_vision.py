"""Meta's own multimodal model on a tiny random checkpoint, to compare with.

Its code needs torchvision for four things that Pillow and torch can also do; a stand-in provides those.
"""

import enum
import functools
import sys
import types
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.support.vision import ENCODER, PARAMS, draw, spans


def _stand_in() -> dict[str, types.ModuleType]:
    transforms = types.ModuleType("torchvision.transforms")
    functional = types.ModuleType("torchvision.transforms.functional")

    class Normalize:
        def __init__(self, mean, std, inplace):
            self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

        def __call__(self, x: Tensor) -> Tensor:
            return x.sub_(self.mean).div_(self.std)

    transforms.ToTensor = lambda: (
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    )
    transforms.Normalize = Normalize
    transforms.InterpolationMode = enum.Enum("InterpolationMode", {"BILINEAR": "bilinear"})
    functional.resize = lambda image, size, interpolation: image.resize(size[::-1], Image.BILINEAR)
    transforms.functional = functional
    package = types.ModuleType("torchvision")
    package.transforms = transforms
    return {
        "torchvision": package,
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": functional,
    }


sys.modules.update(stand_in := _stand_in())
from llama_models.llama3.args import ModelArgs  # noqa: E402
from llama_models.llama3.multimodal import model  # noqa: E402

for name in stand_in:
    del sys.modules[name]


def build(seed: int = 0, max_seq_len: int = 64, max_batch_size: int = 4, **changes):
    """Meta's model with random weights, in fp32. Needs fairscale's model-parallel group."""
    args = ModelArgs(**{**PARAMS, **changes}, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    small = functools.partial(model.VisionEncoder, width=ENCODER["vision_dim"], heads=ENCODER["vision_heads"])
    with mock.patch.object(model, "VisionEncoder", small):
        meta = model.CrossAttentionTransformer(args)
    width = 6 * ENCODER["vision_dim"]
    meta.vision_model.vision_projection = model.ColumnParallelLinear(
        width, args.dim, bias=True, init_method=lambda x: x
    )
    generator = torch.Generator().manual_seed(seed)
    meta.load_state_dict({name: draw(name, p, generator) for name, p in meta.state_dict().items()})
    meta.eval()
    meta.setup_cache(max_batch_size, torch.device("cpu"), torch.float32)
    return meta


def logits(meta, prompts: list[list[int]], images: list[list[Image.Image]], total: int) -> Tensor:
    """fp32 (batch, total, vocab_size) for tokens (batch, total), in one pass."""
    masks = [spans(prompt) for prompt in prompts]
    caches, mask, rows = meta.compute_vision_tokens_masks(images, masks, total, torch.device("cpu"))
    return meta(torch.arange(total), torch.tensor(prompts), mask, rows, caches, not any(images))
