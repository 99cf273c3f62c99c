"""The flags that commands share, each defined once, with its help."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama.cli.terminal import Terminal
from llama.errors import ArgumentError
from llama.generation import Llama
from llama.sampling import SamplingParams


@dataclass(frozen=True)
class BuildOptions:
    """Loading the model:

    Args:
        tokenizer_path: a tokenizer other than the checkpoint's own
        max_seq_len: maximum tokens of prompt plus answer; sets the size of the KV cache
        max_batch_size: sequences computed at the same time; sets the size of the KV cache
        device: cuda, cuda:N, mps or cpu; by default the best one available
        dtype: bfloat16, float16 or float32; by default the best one for the device
        quantize: quantize the weights as they load (fp8: CUDA only); by default as stored
        compile: compile the model; auto means on CUDA only
        adapter: folder of a LoRA adapter in PEFT's format, merged into the weights
        batch_invariant: make logprobs bit-identical whatever else runs, at some cost in speed
        vision: load a vision model with image support
        max_images: maximum images per chat or prompt; sets the size of a vision model's image cache
        mmap: read the weights from their files in every step, for models larger than memory; CPU only
    """

    tokenizer_path: str | None = None
    max_seq_len: int = 4096
    max_batch_size: int = 1
    device: str | None = None
    dtype: str | None = None
    quantize: Literal["int8", "int5", "int4", "fp8"] | None = None
    compile: bool | Literal["auto"] = "auto"
    adapter: str | None = None
    batch_invariant: bool = False
    vision: bool = True
    max_images: int = 1
    mmap: bool = False

    def build(self, ckpt_dir: str) -> Llama:
        """Load a checkpoint with these options. Raises what `Llama.build` raises."""
        return Llama.build(ckpt_dir, **asdict(self))


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling:

    Args:
        temperature: divides the logits; 0 always picks the most likely token
        top_p: keep the most likely tokens whose probabilities sum to this
        top_k: keep only the N most likely tokens
        min_p: drop tokens whose probability is below this fraction of the most likely token's
        repetition_penalty: divides the logits of tokens already in prompt and answer; 1 has no effect
        presence_penalty: subtracted from the logit of each token already in the answer
        frequency_penalty: subtracted from a token's logit once for each time it occurs in the answer
        logit_bias: added to the logits of these token ids, as in '{"198": -100}'
        stop: text that ends the answer and is not part of it; a JSON list for several
        stop_token_ids: ids that end the answer, besides the tokenizer's own; a JSON list for several
        max_gen_len: maximum number of new tokens; by default as many as fit
        seed: for the random draws; by default each answer has its own, the same in every run
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_gen_len: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises ArgumentError for a value out of range, before any model is loaded."""
        values = self.arguments()
        values["max_tokens"] = values.pop("max_gen_len")
        values["seed"] = values["seed"] or 0
        values["stop_token_ids"] = frozenset(values["stop_token_ids"])
        del values["stop"]
        SamplingParams(**values)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the methods of `Llama`."""
        return asdict(self)


def read_prompt(prompt: str | None, file: str | None, terminal: Terminal) -> str:
    """The prompt: the argument, a file's text, or standard input without its last newline."""
    if prompt is not None:
        return prompt
    if file is not None:
        return terminal.once(lambda: Path(file).read_text("utf-8"))
    return terminal.once(sys.stdin.read).removesuffix("\n")


def check_prompt(prompt: str | None, file: str | None) -> None:
    """Raise ArgumentError or FileNotFoundError, before a model is loaded, unless there is one prompt."""
    if prompt is not None and file is not None:
        raise ArgumentError("pass the prompt or --file, not both")
    if prompt is None and file is None and sys.stdin.isatty():
        raise ArgumentError("no prompt: pass one after the checkpoint folder, name a --file, or pipe it in")
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"no file {file} to read the prompt from")
