"""python -m llama: the commands, each also under `torchrun -m llama`."""

from llama.bench import bench
from llama.launch import launch
from llama.perplexity import perplexity


def convert(source: str, destination: str) -> None:
    """Write a GGUF file's model as a native checkpoint folder.

    Args:
        source: a GGUF file of the llama architecture.
        destination: the folder to make; it must not exist.
    """
    from llama.interop import gguf

    gguf.convert(source, destination)
    print(f"Wrote {destination}")


if __name__ == "__main__":
    launch({"bench": bench, "convert": convert, "perplexity": perplexity}, name="python -m llama")
