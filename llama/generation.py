"""The public `Llama`: build it from a checkpoint, complete text, answer dialogs."""

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TypedDict, TypeVar

import torch

from llama import parallel
from llama.chat_format import Dialog, Message, chat_format
from llama.checkpoint import CheckpointError, find_shards, load_weights, read_params
from llama.device import default_device, default_dtype, gigabytes, parse_dtype, total_memory
from llama.engine import Engine, PromptError, Request
from llama.model import ModelArgs, Transformer
from llama.packing import pack
from llama.parallel import ModelParallel
from llama.quantization import check_quantize, quantize, weight_bytes
from llama.sampling import SamplingParams, derive_seed
from llama.tokenizer import Tokenizer

StrPath = str | os.PathLike[str]
T = TypeVar("T")


class Scored(TypedDict, total=False):
    tokens: list[str]  # each token as text
    logprobs: list[float]


class CompletionPrediction(Scored):
    generation: str


class ChatPrediction(Scored):
    generation: Message


class Llama:
    """A model with its tokenizer, ready to generate.

    Use it as a context manager, or `close()` it, to take down what `build` set up between ranks;
    otherwise that happens at the end of the program.
    """

    @staticmethod
    def build(
        ckpt_dir: StrPath,
        tokenizer_path: StrPath | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
    ) -> "Llama":
        """Load a native checkpoint: a folder of consolidated.*.pth, params.json and tokenizer.model.

        tokenizer_path: by default `tokenizer.model` in ckpt_dir.
        max_seq_len: tokens of prompt and answer together. max_batch_size: sequences at a time. The
        KV cache is allocated for both.
        model_parallel_size: ranks that share the model; by default all that `torchrun` started. Any
        number that divides the model's heads, whatever the number of files.
        seed: of all sampling, for calls that bring no seed of their own.
        device: by default the rank's CUDA device, else MPS, else the CPU.
        dtype: "bfloat16", "float16" or "float32"; by default bf16 where the device computes in it.
        quantize: "int8" or "int4" weights, on x86 CPUs; by default they stay in dtype.

        Raises FileNotFoundError where a file lacks, ValueError (CheckpointError where the files are
        to blame) where they, the arguments and the ranks do not fit, MemoryError where weights and
        cache are larger than the device's memory.
        """
        device = torch.device(device) if device is not None else default_device()
        dtype = parse_dtype(dtype) if dtype is not None else default_dtype(device)
        check_quantize(quantize, device)
        group = parallel.connect(model_parallel_size, device)
        try:
            with group.together():
                ckpt_dir = Path(ckpt_dir)
                args = ModelArgs(
                    **read_params(ckpt_dir), max_seq_len=max_seq_len, max_batch_size=max_batch_size
                )
                tokenizer = Tokenizer(tokenizer_path or ckpt_dir / "tokenizer.model")
                model = load(ckpt_dir, args, tokenizer.n_words, group, device, dtype, quantize)
                llama = Llama(model, tokenizer, seed)
        except BaseException:
            parallel.disconnect()
            raise
        llama._connected = True
        return llama

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = chat_format(tokenizer)
        self.engine = Engine(model)
        self._seed = seed
        self._requests = 0  # made so far without a seed of their own
        self._connected = False

    def close(self) -> None:
        """Free the weights and the cache, and leave the process group if `build` made it."""
        if self._connected:
            self._connected = False
            parallel.disconnect()

    def __enter__(self) -> "Llama":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue prompts of token ids, each until a stop token, which is left out.

        prompt_tokens: any number; `max_batch_size` of them run at a time.
        max_gen_len: new tokens at most, within max_seq_len; None for as many as fit; 0 scores the
        prompts, with logprobs and echo.
        temperature, top_p: see `SamplingParams`. seed: of every prompt's own draws.
        echo: put the prompt in front of its answer.

        Returns the ids, and with `logprobs` the log-probability of each under the raw logits (0 for
        a prompt's first), else None. Raises PromptError where a prompt is empty, leaves no room, or
        has unknown ids; ValueError for parameters out of range, and for no prompts at all.
        """
        if not prompt_tokens:
            raise ValueError("no prompts: give one at least")
        requests: list[Request] = []
        try:
            for i, prompt in enumerate(prompt_tokens):
                params = SamplingParams(
                    temperature=temperature,
                    top_p=top_p,
                    seed=self._next_seed() if seed is None else seed,
                    max_tokens=max_gen_len,
                    logprobs=logprobs,
                    prompt_logprobs=logprobs and echo,
                    stop_token_ids=frozenset(self.tokenizer.stop_tokens),
                )
                try:
                    requests.append(self.engine.add(prompt, params))
                except PromptError as error:
                    raise PromptError(f"prompt {i}: {error}") from None
            for event in self.engine.run(requests):
                if event.finish_reason == "error":
                    raise RuntimeError(f"prompt {requests.index(event.request)}: {event.error}")
        finally:
            for request in requests:
                self.engine.cancel(request)
        tokens = [[*r.prompt, *r.tokens] if echo else r.tokens for r in requests]
        return tokens, [r.prompt_logprobs + r.logprobs for r in requests] if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
    ) -> list[CompletionPrediction]:
        """Continue texts. Arguments and errors are those of `generate`.

        Returns for each prompt {"generation": text}, and with `logprobs` also the "tokens", each as
        text, and their "logprobs".
        """
        ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in _list_of(prompts, "prompts")]
        tokens, scores = self.generate(ids, max_gen_len, temperature, top_p, logprobs, echo, seed=seed)
        return [
            {"generation": self.tokenizer.decode(t), **self._scored(t, scores[i] if scores else None)}
            for i, t in enumerate(tokens)
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: int | None = None,
    ) -> list[ChatPrediction]:
        """Answer dialogs: lists of {"role": ..., "content": ...}. Other arguments as in `generate`.

        Returns for each {"generation": {"role": "assistant", "content": text}}, and with `logprobs`
        also "tokens" and "logprobs". Raises ValueError for a dialog that the chat format cannot hold.
        """
        ids = [self.formatter.encode_dialog_prompt(dialog) for dialog in _list_of(dialogs, "dialogs")]
        tokens, scores = self.generate(ids, max_gen_len, temperature, top_p, logprobs, seed=seed)
        return [
            {
                "generation": {"role": "assistant", "content": self.tokenizer.decode(t)},
                **self._scored(t, scores[i] if scores else None),
            }
            for i, t in enumerate(tokens)
        ]

    def _scored(self, tokens: list[int], logprobs: list[float] | None) -> Scored:
        if logprobs is None:
            return {}
        return {"tokens": [self.tokenizer.decode([token]) for token in tokens], "logprobs": logprobs}

    def _next_seed(self) -> int:
        self._requests += 1
        return derive_seed(self._seed, self._requests)


def load(
    ckpt_dir: Path,
    args: ModelArgs,
    n_words: int,
    group: ModelParallel,
    device: torch.device,
    dtype: torch.dtype,
    scheme: str | None = None,
) -> Transformer:
    """This rank's part of a checkpoint's model, cache allocated, for a tokenizer of n_words tokens.

    Tells on stderr of rank 0 what it does. Raises what `Llama.build` raises.
    """
    start = time.perf_counter()
    shards = find_shards(ckpt_dir)
    if args.vocab_size == -1:  # LLaMA 1 and 2 leave it to the tokenizer
        args.vocab_size = n_words
    if args.vocab_size != n_words:
        raise CheckpointError(
            f"the tokenizer has {n_words} tokens, but {ckpt_dir / 'params.json'} says "
            f"vocab_size={args.vocab_size}: is it the tokenizer.model of this checkpoint?"
        )
    with torch.device("meta"):
        model = Transformer(args, group)
    resident = weight_bytes(model, dtype, scheme)
    cache = math.prod(model.cache_shape()) * dtype.itemsize
    sequences = f"max_batch_size={args.max_batch_size}, max_seq_len={args.max_seq_len}"
    memory = total_memory(device)
    if memory is not None and resident + cache > memory:
        raise MemoryError(
            f"weights of {gigabytes(resident)} and a KV cache of {gigabytes(cache)} ({sequences}) do not "
            f"fit into the {gigabytes(memory)} of {device}: lower max_seq_len or max_batch_size, "
            "or use more ranks"
        )

    def say(text: str) -> None:
        if group.rank == 0:
            print(text, file=sys.stderr)

    load_weights(model, shards, dtype, device)
    weights = sum(weight.nbytes for weight in model.parameters())  # fewer where embeddings are tied
    share = f", {group.size} ranks" if group.size > 1 else ""
    say(
        f"Loaded {ckpt_dir.resolve().name}: {len(shards)} file(s), {gigabytes(weights)} in {str(dtype)[6:]} "
        f"on {device}{share}, {time.perf_counter() - start:.1f} s"
    )
    if scheme is None:
        pack(model)
    else:
        quantize(model, scheme)
        say(f"Quantized to {scheme}: {gigabytes(resident)}, {time.perf_counter() - start:.1f} s")
    say(f"KV cache: {gigabytes(cache)} for {sequences}")
    model.allocate_cache()
    return model


def _list_of(values: Sequence[T], what: str) -> Sequence[T]:
    """Raise ValueError for the one thing where a list of them belongs."""
    if isinstance(values, str | dict):
        raise ValueError(
            f"{what} must be a list, one entry per request, not a single {type(values).__name__}"
        )
    return values
