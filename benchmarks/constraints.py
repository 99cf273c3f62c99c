"""The cost of constrained answers: steps with and without a mask, alternating.

python benchmarks/constraints.py CKPT_DIR
"""

import statistics
import time
from typing import Any

from llama import Llama
from llama.cli.launch import launch

NEW = 48
SHAPES: dict[str, dict[str, Any]] = {
    "free": {},
    "a text of any letters": {"regex": r"[^\n]{1000,2000}"},
    "JSON by a schema": {"schema": {"type": "array", "items": {"type": "string"}, "minItems": 200}},
    "a nested grammar": {"grammar": 'start: (item ", "){60,90}\nitem: /[a-z]+/ | "(" item ")"'},
}


def main(ckpt_dir: str, batch: int = 1, rounds: int = 5) -> None:
    """Print milliseconds per token for each constraint, compared with an unconstrained answer.

    Args:
        ckpt_dir: folder of the weights
        batch: answers at the same time
        rounds: number of rounds over all constraints; the output shows medians
    """
    with Llama.build(ckpt_dir, max_seq_len=256, max_batch_size=batch) as llama:
        times: dict[str, list[float]] = {name: [] for name in SHAPES}
        for round in range(rounds + 1):  # the first one warms up
            for name, shape in SHAPES.items():
                start = time.perf_counter()
                prompts = [f"{round} {i} Once upon a time" for i in range(batch)]
                ban = dict.fromkeys(llama.tokenizer.stop_tokens, -100.0)
                answers = llama.text_completion(
                    prompts, temperature=0.8, seed=round, max_gen_len=NEW, logit_bias=ban, **shape
                )
                assert all(answer["finish_reason"] == "length" for answer in answers), answers
                if round:
                    times[name].append((time.perf_counter() - start) / NEW * 1000)
    free = statistics.median(times["free"])
    for name, found in times.items():
        print(f"{name:24} {statistics.median(found):7.2f} ms/token, {statistics.median(found) / free:.2f}")


if __name__ == "__main__":
    launch(main)
