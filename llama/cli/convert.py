"""The command that converts a checkpoint."""

import signal
import sys
from functools import partial
from typing import Literal

from llama.calibration import mean_squares, read_text
from llama.checkpoint.convert import convert as write


def convert(
    source: str,
    destination: str,
    *,
    to: Literal["native", "hf"] = "native",
    shards: int | None = None,
    dtype: str | None = None,
    quantize: Literal["int8", "int5", "int4"] | None = None,
    calibrate: str | None = None,
    tokenizer_path: str | None = None,
    adapter: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint to another format or number of files, in a new folder.

    Args:
        source: a native or Hugging Face folder, a GGUF file, a URL, or a Hugging Face repository
        destination: the folder to create
        to: native writes consolidated.*.pth, hf writes safetensors for transformers, vLLM and TGI
        shards: number of weight files; by default as many as the source has, or the usual number
        dtype: bfloat16, float16 or float32; by default the source's
        quantize: quantize the weights; the result is a native folder that every command loads
        calibrate: with quantize, a text file that the model reads first; its weights then lose less of what
            texts like this one need
        tokenizer_path: a tokenizer other than the source's own
        adapter: folder of a LoRA adapter in PEFT's format, merged into the weights
        overwrite: replace the destination if it exists
    """
    # As for Ctrl-C, so that no partial output is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    measure = None if calibrate is None else partial(mean_squares, text=read_text(calibrate))
    write(source, destination, to, shards, dtype, tokenizer_path, adapter, overwrite, quantize, measure)
    print(f"Wrote {destination}")
