"""What tests with several ranks run on each rank, under torchrun."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from llama import Llama
from llama.cli.launch import launch

TOKENS = torch.arange(3 * 16).view(3, 16)
PROMPTS = [[1, 2, 3], list(range(30, 45)), [9] * 7]


def observe(llama: Llama) -> dict:
    """Logits and generated tokens, greedy and sampled."""
    tokens, logprobs = llama.generate(PROMPTS, 12, temperature=0, logprobs=True, echo=True)
    return {
        "logits": llama.model(TOKENS, 0),
        "greedy": tokens,
        "logprobs": logprobs,
        "sampled": llama.generate(PROMPTS, 12, 1.0, 0.95, seed=5)[0],
    }


def every_checkpoint(folders: str, out: str) -> None:
    """Observe each checkpoint under `folders`; rank r writes what it saw to `out`/r.pt."""
    seen = {}
    for folder in sorted(Path(folders).iterdir()):
        with Llama.build(folder, max_seq_len=32, max_batch_size=3, dtype="float32") as llama:
            seen[folder.name] = observe(llama)
            shapes = [tuple(weight.shape) for weight in llama.model.parameters()]
        seen[folder.name]["shapes"] = shapes
        assert not dist.is_initialized()
    torch.save(seen, Path(out) / f"{os.environ['RANK']}.pt")


def two_at_once(folder: str, out: str) -> None:
    """Two models in one process; the first to close leaves the other its process group."""
    first = Llama.build(folder, max_seq_len=32, max_batch_size=3, dtype="float32")
    second = Llama.build(folder, max_seq_len=32, max_batch_size=3, dtype="float32")
    seen = observe(first)
    first.close()
    first.close()
    assert observe(second)["greedy"] == seen["greedy"]
    second.close()
    assert not dist.is_initialized()
    # and one more, which is never closed
    torch.save(
        observe(Llama.build(folder, max_seq_len=32, max_batch_size=3, dtype="float32")),
        f"{out}.{os.environ['RANK']}",
    )
    print("only rank 0 prints")


def one_after_another(folder: str, out: str) -> None:
    """Three models in turn; rank 0 is slow to close each, so the others ask for the next group first."""
    for _ in range(3):
        with Llama.build(folder, max_seq_len=32, max_batch_size=3, dtype="float32") as llama:
            seen = observe(llama)
            if os.environ["RANK"] == "0":
                time.sleep(0.5)
        del llama  # it refers to the group
    torch.save(seen, f"{out}.{os.environ['RANK']}")


def replicas(folder: str, out: str) -> None:
    """Each half of the ranks has one copy of the model, with different work."""
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    with Llama.build(folder, None, 32, 3, size // 2, dtype="float32") as llama:
        prompt = PROMPTS[rank // (size // 2)]
        torch.save(llama.generate([prompt], 12, temperature=0)[0], f"{out}.{rank}")


def die(folder: str, rank: int) -> None:
    """One rank is killed in the middle of generating."""
    llama = Llama.build(folder, max_seq_len=32, max_batch_size=3, dtype="float32")
    llama.tokenizer.stop_tokens = []
    requests = 0
    hidden = llama.model.hidden

    def killed_at_the_third(tokens, rows):
        nonlocal requests
        requests += 1
        if requests == 3 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return hidden(tokens, rows)

    llama.model.hidden = killed_at_the_third  # type: ignore[method-assign]
    llama.generate(PROMPTS, 12)


def one_bad_folder(folder: str) -> None:
    """The last rank opens a missing folder, as on a machine without the files."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    Llama.build(f"{folder}-missing" if last else folder, max_seq_len=32, max_batch_size=1)


def quantized(folder: str, out: str, scheme: str | None = None) -> None:
    """Logits of a quantized model."""
    with Llama.build(folder, max_seq_len=32, max_batch_size=3, dtype="float32", quantize=scheme) as llama:
        torch.save(llama.model(TOKENS, 0), f"{out}.{os.environ['RANK']}")


def in_shape(llama: Llama) -> dict:
    """Answers to a schema and with a required tool, and embeddings."""
    noise = {"temperature": 1.5, "top_p": 1.0, "seed": 3, "max_gen_len": 60}
    word = {"type": "string", "maxLength": 5}
    schema = {
        "type": "object",
        "properties": {"name": word},
        "required": ["name"],
        "additionalProperties": False,
    }
    tool = {"name": "f", "parameters": schema}
    return {
        "schema": llama.text_completion(["a", "b"], schema=schema, **noise),
        "call": llama.chat_completion(
            [[{"role": "user", "content": "Hi"}]],
            tools=[tool],
            tool_choice="required",
            tool_format="json",
            **noise,
        ),
        "vectors": llama.embed(["a", "bcd"]),
    }


def shapes(folder: str, out: str) -> None:
    """The results of `in_shape` on each rank."""
    with Llama.build(folder, max_seq_len=1024, max_batch_size=3, dtype="float32") as llama:
        torch.save(in_shape(llama), f"{out}.{os.environ['RANK']}")


if __name__ == "__main__":
    commands = (every_checkpoint, two_at_once, one_after_another, replicas, die)
    launch({f.__name__: f for f in (*commands, one_bad_folder, quantized, shapes)})
