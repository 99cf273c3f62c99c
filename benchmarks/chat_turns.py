"""Time to first token in each turn of a long chat, compared with the same prompt and a cold cache.

python benchmarks/chat_turns.py CKPT_DIR
"""

import random
import statistics
from typing import cast

from llama import Llama
from llama.cli.conversation import Conversation, Turn
from llama.cli.launch import launch
from llama.streaming import Stats

TURNS, WORDS, ANSWER = 5, 150, 60


def ask(llama: Llama, prompt: list[int]) -> tuple[list[int], Stats]:
    """The ids of a greedy answer, with its counts and times."""
    events = list(llama.stream_tokens([prompt], temperature=0, max_gen_len=ANSWER))
    return [event.token for event in events if event.token is not None], cast(Stats, events[-1].stats)


def main(ckpt_dir: str, rounds: int = 5) -> None:
    words = ["llama", "mountain", "river", "answer", "question", "number", "story", "simple", "reason"]
    generator = random.Random(0)
    warm: list[list[float]] = [[] for _ in range(TURNS)]
    cold: list[float] = []
    with Llama.build(ckpt_dir, max_seq_len=4096, max_batch_size=1) as llama:
        for _ in range(rounds):
            chat = Conversation("You explain what you are asked.")
            for turn in range(TURNS):
                message = " ".join(generator.choices(words, k=WORDS))
                prompt = chat.prompt(llama, message)
                answer, stats = ask(llama, prompt)
                warm[turn].append(stats.first_token_seconds)
                chat.turns.append(Turn(message, answer))
            reused = stats.reused_tokens
            llama.engine.slots.all[0].tokens.clear()
            _, stats = ask(llama, prompt)
            cold.append(stats.first_token_seconds)
    for turn, seconds in enumerate(warm, 1):
        print(f"turn {turn}: first token after {statistics.median(seconds):.3f} s")
    print(
        f"turn {TURNS} cold: {statistics.median(cold):.3f} s "
        f"({len(prompt)} tokens, of which the warm one reused {reused})"
    )
    ratio = statistics.median(c / w for c, w in zip(cold, warm[-1], strict=True))
    print(f"cold / warm: {ratio:.1f} (median of {rounds} pairs)")


if __name__ == "__main__":
    launch(main)
