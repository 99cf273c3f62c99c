"""python -m llama: the commands, each also under `torchrun -m llama`."""

from llama.launch import launch


def convert(
    source: str,
    destination: str,
    to: str = "native",
    shards: int | None = None,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
    adapter: str | None = None,
    overwrite: bool = False,
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
    """
    from llama.interop.convert import convert

    convert(source, destination, to, shards, dtype, tokenizer_path, adapter, overwrite)
    print(f"Wrote {destination}")


if __name__ == "__main__":
    launch({"convert": convert}, name="python -m llama")
