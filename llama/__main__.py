"""python -m llama: the commands, each also under `torchrun -m llama`."""

from llama.chat import chat, complete
from llama.launch import launch


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
    launch({"chat": chat, "complete": complete, "convert": convert}, name="python -m llama")
