"""python -m llama: the commands, each also under `torchrun -m llama`."""

import signal
import sys

from llama.cli.bench import bench
from llama.cli.chat import chat, complete
from llama.cli.launch import launch
from llama.cli.perplexity import perplexity


def convert(
    source: str,
    destination: str,
    to: str = "native",
    shards: int | None = None,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
    adapter: str | None = None,
    overwrite: bool = False,
    quantize: str | None = None,
) -> None:
    """Write a checkpoint in another format, or with other files.

    Args:
        source: a native or Hugging Face folder, or a GGUF file.
        destination: the folder to make.
        to: native (consolidated.*.pth) or hf (safetensors, for transformers, vLLM, TGI).
        shards: files to cut the weights into; by default as the source has, or as is usual.
        dtype: bf16, fp16 or fp32; by default the source's.
        tokenizer_path: of another tokenizer than the source's own.
        adapter: a folder with a LoRA adapter in PEFT's format to merge into the weights.
        overwrite: replace the destination where it exists.
        quantize: int8 or int4 weights, in a folder that every command loads.
    """
    from llama.checkpoint.convert import convert

    # As on Ctrl-C, so that nothing half-made stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    convert(source, destination, to, shards, dtype, tokenizer_path, adapter, overwrite, quantize)
    print(f"Wrote {destination}")


def info(
    ckpt_dir: str,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    dtype: str | None = None,
    quantize: str | None = None,
    tokenizer_path: str | None = None,
    adapter: str | None = None,
    max_images: int = 1,
) -> None:
    """Tell what a checkpoint is, and what memory it takes to run it.

    Args:
        ckpt_dir: a native or Hugging Face folder, or a GGUF file.
        max_seq_len: tokens of the KV cache per sequence.
        max_batch_size: sequences of the KV cache.
        dtype: bf16, fp16 or fp32; by default that of the files.
        quantize: of the weights, int8, int4 or fp8; by default that of the files.
        tokenizer_path: of another tokenizer than the checkpoint's own.
        adapter: a folder with a LoRA adapter in PEFT's format.
        max_images: images of the cache per sequence, where the model sees.
    """
    from llama.cli.info import describe

    print(
        describe(ckpt_dir, max_seq_len, max_batch_size, dtype, quantize, tokenizer_path, adapter, max_images)
    )


if __name__ == "__main__":
    launch(
        {
            "bench": bench,
            "chat": chat,
            "complete": complete,
            "convert": convert,
            "info": info,
            "perplexity": perplexity,
        },
        name="python -m llama",
    )
