"""Continue a few texts: torchrun --nproc_per_node 1 example_text_completion.py --ckpt_dir DIR"""

from typing import Literal

from llama import Llama
from llama.cli.launch import default_ckpt_dir, launch


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    *,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int | None = 64,
    max_batch_size: int = 4,
    quantize: str | None = None,
    compile: bool | Literal["auto"] = "auto",
) -> None:
    """Continue a few texts with a base model.

    Args:
        ckpt_dir: folder of a checkpoint; by default the demo model's, if it is here.
        tokenizer_path: a tokenizer other than the checkpoint's own.
        temperature: divides the logits; 0 always picks the most likely token.
        top_p: keep the most likely tokens whose probabilities sum to this.
        max_seq_len: maximum tokens of a text plus its continuation.
        max_gen_len: maximum number of new tokens; None for as many as fit.
        max_batch_size: texts continued at the same time.
        quantize: int8, int5 or int4 weights, or fp8 on CUDA; by default as stored.
        compile: compile the model; auto means on CUDA only.
    """
    prompts = [
        "The llama and the alpaca differ in",
        "Simply put, the theory of relativity states that",
        # Examples first, then the question: a base model continues the pattern.
        """Translate English to French:

cheese => fromage
good morning => bonjour
the sea =>""",
        """A short note to the whole team:

Hello everyone,

Tomorrow we release""",
    ]
    with Llama.build(
        ckpt_dir=ckpt_dir or default_ckpt_dir(),
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        quantize=quantize,
        compile=compile,
    ) as llama:
        results = llama.text_completion(
            prompts, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len
        )

    for prompt, result in zip(prompts, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    launch(main)
