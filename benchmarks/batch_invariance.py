"""The cost of `batch_invariant=True`: the same work with and without it, alternating.

python benchmarks/batch_invariance.py CKPT_DIR [DTYPE]
"""

import random
import statistics
import time

from llama import Llama
from llama.cli.launch import launch
from llama.engine import Engine
from llama.sampling import SamplingParams

SLOTS, PROMPT, NEW = 8, 64, 32


def seconds(engine: Engine, prompts: list[list[int]]) -> tuple[float, float]:
    """Seconds for prefill of the prompts, and for generating NEW tokens after each."""
    for slot in range(SLOTS):
        engine.slots.all[slot].tokens.clear()
    params = SamplingParams(temperature=0, max_tokens=NEW + 1)
    start = time.perf_counter()
    requests = [engine.add(prompt, params) for prompt in prompts]
    while not all(request.tokens for request in requests):
        engine.step()
    read = time.perf_counter()
    while engine.has_work():
        engine.step()
    return read - start, time.perf_counter() - read


def main(ckpt_dir: str, dtype: str | None = None, rounds: int = 5) -> None:
    generator = random.Random(0)
    with Llama.build(
        ckpt_dir, max_seq_len=256, max_batch_size=SLOTS, dtype=dtype, batch_invariant=True
    ) as llama:
        plain, invariant = Engine(llama.model), llama.engine
        print(f"{llama.model.dtype}, {SLOTS} slots, prompts of {PROMPT}, {NEW} new tokens each")
        for live in (SLOTS, 1):
            pairs = []
            for _ in range(rounds):
                prompts = [[generator.randrange(1000, 5000) for _ in range(PROMPT)] for _ in range(live)]
                pairs.append((*seconds(plain, prompts), *seconds(invariant, prompts)))
            read, new, invariant_read, invariant_new = (
                statistics.median(x) for x in zip(*pairs, strict=True)
            )
            reading = statistics.median(pair[2] / pair[0] for pair in pairs)
            generating = statistics.median(pair[3] / pair[1] for pair in pairs)
            print(
                f"{live} live: prompts {read:.3f} s to {invariant_read:.3f} s ({reading:.2f} times), "
                f"{live * NEW / new:.1f} tokens/s to {live * NEW / invariant_new:.1f} "
                f"({generating:.2f} times as long)"
            )


if __name__ == "__main__":
    launch(main)
