"""What tests of images on several ranks run on each rank, under torchrun."""

import os
from pathlib import Path
from typing import Any

import torch

from llama import Llama
from llama.cli.launch import launch
from llama.vision import PlacedImage, tile_image

BUILD: dict[str, Any] = {"max_seq_len": 512, "max_batch_size": 3, "max_images": 4, "dtype": "float32"}
MODULE = ["-m", "tests.support.vision_ranks"]
SIZES = {"wide": (112, 50), "tall": (40, 150), "small": (40, 40)}  # of the images
PLACES = (2, 5, 6)  # of the images in `seen`


def part(path: Path) -> dict:
    return {"type": "image", "image": str(path)}


def user(*content: Any) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def talk(llama: Llama, images: Path) -> dict:
    """Answers, streams, and next turns about images; and how often the encoder ran."""
    wide, tall, small = (part(images / f"{name}.png") for name in SIZES)
    encode, encoded = llama.model.encode, []

    def counting(image):
        encoded.append(image.key)
        return encode(image)

    llama.model.encode = counting
    dialogs = [
        [{"role": "user", "content": "the llama"}],
        user(wide, "the llama in the"),
        user("an", tall, small, "in", wide, "er"),
        [{"role": "system", "content": "the"}, *user("in the", small)],
    ]
    options: dict[str, Any] = {"max_gen_len": 8, "temperature": 0, "logprobs": True}
    found: dict[str, Any] = {
        "greedy": llama.chat_completion(dialogs, **options),
        "encoded": [len(encoded)],
        "sampled": llama.chat_completion(dialogs, **{**options, "temperature": 1.0, "seed": 5}),
        "streamed": [
            (event.index, event.token, event.text, event.finish_reason)
            for event in llama.stream_chat(dialogs, max_gen_len=8, temperature=1.0, seed=5)
        ],
    }
    # Two users, each with a picture of their own, who ask on about it.
    first = [user(wide, "the llama"), user("in the", tall, "er")]
    answers = llama.chat_completion(first, **options)
    before = len(encoded)
    following = [
        [*dialog, answer["generation"], {"role": "user", "content": "er"}]
        for dialog, answer in zip(first, answers, strict=True)
    ]
    events = list(llama.stream_chat(following, max_gen_len=8, temperature=0))
    found |= {
        "first": answers,
        "next": ["".join(event.text for event in events if event.index == i) for i in range(2)],
        "reused": [(event.index, event.stats.reused_tokens) for event in events if event.stats],
        "prompts": [len(request.prompt) for request in llama.chat_requests(first)],
    }
    found["encoded"] += [before, len(encoded)]
    return found


def seen(llama: Llama, images: Path) -> torch.Tensor:
    """Logits of a prompt with three images."""
    paths = (images / f"{name}.png" for name in SIZES)
    placed = [PlacedImage(at, tile_image(path, 56)) for at, path in zip(PLACES, paths, strict=True)]
    tokens = torch.tensor([[9, 30, 0, 400, 519, 0, 0, 7, 12, 99]])
    tokens[0, list(PLACES)] = llama.model.params.vocab_size
    return llama.model(tokens, 0, [placed])


def talking(folder: str, images: str, out: str) -> None:
    """`talk` on each rank."""
    with Llama.build(folder, **BUILD) as llama:
        torch.save(talk(llama, Path(images)), f"{out}.{os.environ['RANK']}")


def job(text: str, images: Path) -> torch.Tensor:
    """`seen` of a model FOLDER[:SCHEME[:DTYPE[:ADAPTER]]]."""
    folder, scheme, dtype, adapter = (*text.split(":"), "", "", "")[:4]
    options = {"dtype": dtype or "float32", "quantize": scheme or None, "adapter": adapter or None}
    with Llama.build(folder, **{**BUILD, **options}) as llama:
        return seen(llama, images)


def seeing(images: str, out: str, jobs: str) -> None:
    """Several jobs, with commas between them."""
    found = [job(text, Path(images)) for text in jobs.split(",")]
    torch.save(found, f"{out}.{os.environ['RANK']}")


if __name__ == "__main__":
    launch({"talking": talking, "seeing": seeing})
