"""Ask about an image: torchrun --nproc_per_node 1 example_vision.py --ckpt_dir DIR --image FILE"""

from llama import Llama
from llama.cli.launch import launch


def main(
    ckpt_dir: str,
    image: str,
    *,
    question: str = "What is in this image?",
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_gen_len: int | None = None,
    quantize: str | None = None,
) -> None:
    """Ask a vision model about an image.

    Args:
        ckpt_dir: folder of a Llama 3.2 Vision checkpoint.
        image: an image file.
        question: what to ask about it.
        temperature: divides the logits; 0 always picks the most likely token.
        top_p: keep the most likely tokens whose probabilities sum to this.
        max_seq_len: maximum tokens of question plus answer; an image counts as one.
        max_gen_len: maximum number of new tokens; by default as many as fit.
        quantize: int8, int5 or int4 weights, or fp8 on CUDA; by default as stored.
    """
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    with Llama.build(ckpt_dir, max_seq_len=max_seq_len, max_batch_size=1, quantize=quantize) as llama:
        events = llama.stream_chat(
            [[{"role": "user", "content": content}]],
            temperature=temperature,
            top_p=top_p,
            max_gen_len=max_gen_len,
        )
        for event in events:
            print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    launch(main)
