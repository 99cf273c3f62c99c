"""The public `Llama`: build it from a checkpoint, complete text, answer dialogs."""

import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypedDict, TypeVar

import torch
from typing_extensions import Unpack

from llama import parallel
from llama.checkpoint import open_checkpoint
from llama.device import default_device, default_dtype, parse_dtype
from llama.engine import Engine
from llama.engine.static import check_compile
from llama.errors import ArgumentError
from llama.loading import check_quantize, load, scheme_of, warm_up
from llama.model import Transformer
from llama.sampling import SamplingParams, derive_seed
from llama.streaming import Answer, StreamEvent, collect, stream
from llama.tokenizer import Dialog, DialogFormat, Message, TextTokenizer
from llama.tokenizer.chat_format import chat_format
from llama.vision import make_args, text_params

StrPath = str | os.PathLike[str]
T = TypeVar("T")


class Sampling(TypedDict, total=False):
    """Arguments that every call takes, by keyword. See `SamplingParams` for those not told here."""

    seed: int | None  # of every prompt's own draws; None: of this call's place among the program's
    top_k: int | None
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    top_logprobs: int
    stop: str | Sequence[str]  # text that ends the answer, and is not part of it
    stop_token_ids: Sequence[int]  # besides the tokenizer's own


class Scored(TypedDict, total=False):
    tokens: list[str]  # each token as text
    logprobs: list[float]
    top_logprobs: list[list[tuple[str, float]]]


class CompletionPrediction(Scored):
    generation: str


class ChatPrediction(Scored):
    generation: Message


class Llama:
    """A model with its tokenizer, ready to generate.

    Use it as a context manager, or `close()` it, to take down what `build` set up between ranks;
    otherwise that happens at the end of the program.
    quantization: "int8", "int4" or "fp8" where `build` loaded the weights so.
    """

    quantization: str | None = None

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
        adapter: StrPath | None = None,
        batch_invariant: bool = False,
        quantize: str | None = None,
        compile: bool | str = "auto",
        vision: bool = True,
        max_images: int = 1,
    ) -> "Llama":
        """Load a checkpoint: a native or a Hugging Face folder, or a GGUF file; local, or any URL
        that blobfile reads.

        tokenizer_path: by default the tokenizer that lies with the weights.
        max_seq_len: tokens of prompt and answer together. max_batch_size: sequences at a time. The
        KV cache is allocated for both.
        model_parallel_size: ranks that share the model; by default all that `torchrun` started. Any
        number that divides the model's heads, whatever the number of files.
        seed: of all sampling, for calls that bring no seed of their own.
        device: by default the rank's CUDA device, else MPS, else the CPU.
        dtype: "bfloat16", "float16" or "float32"; by default bf16 where the device computes in it.
        adapter: a folder with a LoRA adapter in PEFT's format, merged into the weights.
        batch_invariant: a request's logprobs are the same to the bit whatever else runs beside it, for
        some speed. Refused (ValueError) where this machine's kernels cannot keep it.
        quantize: "int8" or "int4" weights, on x86 CPUs, and on CUDA, there "fp8" too; by default they are
        what the files hold. A folder of quantized weights needs no word here.
        compile: whether to compile the model, and to decode at fixed shapes, on CUDA as a captured graph;
        "auto" does on CUDA, where it pays. Takes its time at build. Not with batch_invariant.
        vision: of a model that sees, whether to load it so. Its image encoder loads with the first image.
        max_images: images in one sequence, for which a cache of their own has room.

        Raises FileNotFoundError where a file lacks, ValueError (CheckpointError where the files are
        to blame) where they, the arguments and the ranks do not fit, MemoryError where weights and
        cache are larger than the device's memory.
        """
        device = torch.device(device) if device is not None else default_device()
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        dtype = parse_dtype(dtype) if dtype is not None else default_dtype(device)
        check_quantize(quantize, device)
        if compile is True and batch_invariant:
            raise ArgumentError("batch_invariant=True has shapes of its own: leave compile=True out")
        compiles = check_compile(compile, device) and not batch_invariant
        group = parallel.connect(model_parallel_size, device)
        try:
            with group.together():
                checkpoint = open_checkpoint(ckpt_dir, tokenizer_path, adapter)
                scheme = scheme_of(checkpoint, quantize)
                check_quantize(scheme, device)
                params = checkpoint.params if vision else text_params(checkpoint.params)
                args = make_args(
                    params, max_seq_len=max_seq_len, max_batch_size=max_batch_size, max_images=max_images
                )
                model = load(checkpoint, args, group, device, dtype, scheme)
            llama = Llama(
                model,
                checkpoint.tokenizer,
                seed,
                checkpoint.formatter,
                batch_invariant=batch_invariant,
                static=compiles,
            )
            if compiles and max_seq_len > 1:
                warm_up(llama.engine, required=compile is True)
        except BaseException:
            parallel.disconnect()
            raise
        llama._connected = True
        llama.quantization = scheme
        return llama

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextTokenizer,
        seed: int = 1,
        formatter: DialogFormat | None = None,
        *,
        batch_invariant: bool = False,
        static: bool = False,
    ) -> None:
        """formatter: of dialogs, by default the one that goes with the tokenizer. Others: see `Engine`."""
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = formatter or chat_format(tokenizer)
        self.engine = Engine(
            model,
            # A GPU wants more rows at a time for its matrix products than a CPU.
            prefill_chunk=2048 if model.device.type == "cuda" else 512,
            batch_invariant=batch_invariant,
            static=static,
        )
        self._seed = seed
        self._requests = 0  # made so far without a seed of their own
        self._connected = False

    def close(self) -> None:
        """Leave the process group that `build` joined; the last to leave takes it down."""
        if self._connected:
            self._connected = False
            if self.engine.decoder:
                self.engine.decoder.close()
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
        **sampling: Unpack[Sampling],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue prompts of token ids, each until a stop token, which is left out.

        prompt_tokens: any number; `max_batch_size` of them run at a time.
        max_gen_len: new tokens at most, within max_seq_len; None for as many as fit; 0 scores the
        prompts, with logprobs and echo.
        temperature, top_p: see `SamplingParams`. sampling: see `Sampling`; after a stop string, its
        tokens are among the ids, for a token may hold more than it.
        echo: put the prompt in front of its answer.

        Returns the ids, and with `logprobs` the log-probability of each under the raw logits (0 for
        a prompt's first), else None. Raises PromptError where a prompt is empty, leaves no room, or
        has unknown ids; ValueError for parameters out of range, and for no prompts at all.
        """
        if sampling.get("top_logprobs"):
            raise ArgumentError("generate returns no top_logprobs; text_completion and the streams do")
        events = self.stream_tokens(
            prompt_tokens, temperature, top_p, max_gen_len, logprobs, echo, **sampling
        )
        answers = collect(events, len(prompt_tokens))
        return [a.tokens for a in answers], [a.logprobs for a in answers] if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **sampling: Unpack[Sampling],
    ) -> list[CompletionPrediction]:
        """Continue texts. Arguments and errors are those of `generate`.

        Returns for each prompt {"generation": text}, and with `logprobs` also the "tokens", each as
        text, and their "logprobs", and with `top_logprobs` those too.
        """
        events = self.stream_text(prompts, temperature, top_p, max_gen_len, logprobs, echo, **sampling)
        return [
            {"generation": answer.text, **self._scored(answer, logprobs)}
            for answer in collect(events, len(prompts))
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **sampling: Unpack[Sampling],
    ) -> list[ChatPrediction]:
        """Answer dialogs: lists of {"role": ..., "content": ...}. Other arguments as in `generate`.

        Returns for each {"generation": {"role": "assistant", "content": text}}, and with `logprobs`
        what `text_completion` does. Raises ValueError for a dialog that the chat format cannot hold.
        """
        events = self.stream_chat(dialogs, temperature, top_p, max_gen_len, logprobs, **sampling)
        return [
            {
                "generation": {"role": "assistant", "content": answer.text},
                **self._scored(answer, logprobs),
            }
            for answer in collect(events, len(dialogs))
        ]

    def stream_text(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Generator[StreamEvent, None, None]:
        """What `text_completion` does, as it happens: an event for each token, and one at each end.

        The pieces of text joined are the answer of `text_completion`. With `echo` the prompt's tokens
        come first. Several streams may be read in turn. Closing one, or dropping it, cancels what has
        not ended and frees its slots. Where one request fails, its end says why and the others go on.
        Raises what `generate` raises, at the call.
        """
        ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in _list_of(prompts, "prompts")]
        return self.stream_tokens(ids, temperature, top_p, max_gen_len, logprobs, echo, **sampling)

    def stream_chat(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Generator[StreamEvent, None, None]:
        """What `chat_completion` does, as it happens; otherwise as `stream_text`."""
        ids = [self.formatter.encode_dialog_prompt(dialog) for dialog in _list_of(dialogs, "dialogs")]
        return self.stream_tokens(ids, temperature, top_p, max_gen_len, logprobs, **sampling)

    def stream_tokens(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Generator[StreamEvent, None, None]:
        """As `stream_text`, for prompts of token ids."""
        if not prompt_tokens:
            raise ArgumentError("no prompts: give one at least")
        values: dict[str, Any] = dict(sampling)
        stop, seed = values.pop("stop", ()), values.pop("seed", None)
        stop = [stop] if isinstance(stop, str) else stop
        if not (isinstance(stop, Sequence) and all(isinstance(text, str) and text for text in stop)):
            raise ArgumentError(f"stop must be a text, or a list of texts, and none empty; not {stop!r}")
        values["stop_token_ids"] = frozenset((*self.tokenizer.stop_tokens, *values.get("stop_token_ids", ())))
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_gen_len,
            logprobs=logprobs,
            prompt_logprobs=logprobs and echo,
            **values,
        )
        prompts = []
        for i, prompt in enumerate(prompt_tokens):
            try:
                self.engine.check(prompt, params)
            except ValueError as error:
                raise type(error)(f"prompt {i}: {error}") from None
            prompts.append((prompt, replace(params, seed=self._next_seed() if seed is None else seed)))
        return stream(self.engine, self.tokenizer, prompts, stop, echo)

    def _scored(self, answer: Answer, logprobs: bool) -> Scored:
        if not logprobs:
            return {}

        def text(token: int) -> str:
            return self.tokenizer.decode([token])

        scored: Scored = {"tokens": [text(token) for token in answer.tokens], "logprobs": answer.logprobs}
        if answer.top_logprobs:
            scored["top_logprobs"] = [[(text(t), p) for t, p in top] for top in answer.top_logprobs]
        return scored

    def _next_seed(self) -> int:
        self._requests += 1
        return derive_seed(self._seed, self._requests)


def _list_of(values: Sequence[T], what: str) -> Sequence[T]:
    """Raise ValueError for the one thing where a list of them belongs."""
    if isinstance(values, str | dict):
        raise ArgumentError(
            f"{what} must be a list, one entry per request, not a single {type(values).__name__}"
        )
    return values
