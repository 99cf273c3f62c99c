"""Answer a few dialogs: torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir DIR"""

from typing import Literal

from llama import Dialog, Llama
from llama.cli.launch import default_ckpt_dir, launch

# A red square next to a blue one.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADAAAAAgAQMAAABuGmlfAAAABlBMVEXcHh4ePMhfedHTAAAAFklEQVR4"
    "2mNkYGD4z8DAxMDAwDAcKQD4BAE/kZkckwAAAABJRU5ErkJggg=="
)


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    *,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
    quantize: str | None = None,
    compile: bool | Literal["auto"] = "auto",
) -> None:
    """Answer a few dialogs with a chat model.

    Args:
        ckpt_dir: folder of a checkpoint; by default the demo model's, if it is here.
        tokenizer_path: a tokenizer other than the checkpoint's own.
        temperature: divides the logits; 0 always picks the most likely token.
        top_p: keep the most likely tokens whose probabilities sum to this.
        max_seq_len: maximum tokens of a dialog plus its answer.
        max_batch_size: dialogs answered at the same time.
        max_gen_len: maximum number of new tokens; by default as many as fit.
        quantize: int8, int5 or int4 weights, or fp8 on CUDA; by default as stored.
        compile: compile the model; auto means on CUDA only.
    """
    dialogs: list[Dialog] = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [
            {"role": "user", "content": "I have two days in Lima. What should I see?"},
            {
                "role": "assistant",
                "content": "Start in the historic centre with the Plaza Mayor, spend the afternoon in the "
                "Larco Museum, and keep the second day for Barranco and the cliffs of Miraflores.",
            },
            {"role": "user", "content": "What is in that museum?"},
        ],
        [
            {"role": "system", "content": "Always answer with a haiku."},
            {"role": "user", "content": "What does a llama dream of?"},
        ],
        [
            {"role": "system", "content": "You explain things to children, in three sentences at most."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
    ]
    with Llama.build(
        ckpt_dir=ckpt_dir or default_ckpt_dir(),
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        quantize=quantize,
        compile=compile,
    ) as llama:
        if llama.sees:
            content = [{"type": "image", "image": PICTURE}, "Which colors are these?"]
            dialogs.append([{"role": "user", "content": content}])
        results = llama.chat_completion(
            dialogs, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len
        )

    for dialog, result in zip(dialogs, results, strict=True):
        for message in [*dialog, result["generation"]]:
            content = message["content"]
            text = content if isinstance(content, str) else f"[an image] {content[-1]}"
            print(f"{message['role'].capitalize()}: {text}\n")
        print("==================================\n")


if __name__ == "__main__":
    launch(main)
