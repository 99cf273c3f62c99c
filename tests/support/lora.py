"""LoRA adapters made by peft."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def train(folder: Path, model: Any, **config: Any) -> Any:
    """An adapter with random factors, saved by peft. Returns peft's merged model."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION + MLP, **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.1, generator=generator)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()
