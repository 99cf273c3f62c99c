"""The public `Llama`: build it from a checkpoint, complete text, answer dialogs."""

import functools
import itertools
import os
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from typing_extensions import Unpack

from llama import ranks
from llama.agent import ToolLoop
from llama.arguments import (
    SHAPES,
    Basic,
    ChatOptions,
    ChatSampling,
    Options,
    Sampling,
    TextRequest,
    flag,
    text_requests,
    whole,
)
from llama.checkpoint import open_checkpoint
from llama.constraints import Grammars
from llama.device import default_device, parse_device, parse_dtype
from llama.embeddings import Embeddings
from llama.engine import Engine
from llama.engine.static import check_compile
from llama.errors import ArgumentError
from llama.loading import check_quantize, load, scheme_of, warm_up
from llama.model import Transformer
from llama.moderation import reviews
from llama.noise import derive_seed
from llama.predictions import (
    ChatPrediction,
    CompletionPrediction,
    chat_prediction,
    collect,
    completion_prediction,
)
from llama.prompts import encode_dialogs, encode_texts, tiled
from llama.streaming import StreamEvent, astream, stream
from llama.tokenizer import Dialog, DialogFormat, TextTokenizer
from llama.tokenizer.chat_format import chat_format
from llama.tools.use import ToolUse, default_format
from llama.vision import VisionTransformer, make_args, text_params

StrPath = str | os.PathLike[str]


class Llama(Embeddings, ToolLoop):
    """A model with its tokenizer, ready to generate.

    Use it as a context manager, or call `close()`, to tear down what `build` set up between ranks;
    otherwise that happens when the program ends.
    quantization: format of the weights if `build` loaded them quantized: "int8", "int5", "int4", "fp8".
    tool_format: how prompts describe tools, see `DialogOptions`; None if the checkpoint was not trained
        to call tools.
    """

    quantization: str | None = None
    tool_format: str | None = None

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
        mmap: bool = False,
        threads: int | None = None,
        whole_steps: bool = True,
    ) -> "Llama":
        """Load a checkpoint.

        ckpt_dir: a native or Hugging Face folder, or a GGUF file; local, or any URL that blobfile reads.
        tokenizer_path: by default the tokenizer next to the weights.
        max_seq_len: maximum tokens of prompt plus answer; sets the size of the KV cache.
        max_batch_size: sequences that run at the same time; sets the size of the KV cache.
        model_parallel_size: ranks that share the model, any number that divides its heads; by default
            all that `torchrun` started.
        seed: for calls without a seed of their own.
        device: "cpu", "cuda", "cuda:1", "mps"; by default this rank's CUDA device, else MPS, else CPU.
        dtype: "bfloat16", "float16" or "float32"; by default bf16, or what is faster here.
        adapter: a folder with a LoRA adapter in PEFT's format, merged into the weights.
        batch_invariant: make a request's logprobs bit-identical whatever runs alongside it, at some cost in
            speed; an error if this machine's kernels cannot guarantee it.
        quantize: "int8", "int5" or "int4" weights, or "fp8" on CUDA; by default as stored in the files.
            A CPU without a compiler dequantizes them as they load.
        compile: compile the model and decode at fixed shapes, on CUDA as a captured graph; slow to
            build, and incompatible with batch_invariant. "auto": on CUDA.
        vision: load a vision model with image support; its image encoder loads with the first image.
        max_images: maximum images per sequence; sets the size of a vision model's image cache.
        mmap: read the weights from their files in every step, at disk speed: for models larger than
            memory, on a CPU, in the dtype of their files.
        threads: for the compiled step on a CPU; by default as many as PyTorch uses.
        whole_steps: False keeps the weights readable and editable, at some cost in speed.

        Raises ArgumentError, before any weight is read, if the arguments do not fit each other or the
        machine; FileNotFoundError if a file is missing, CheckpointError if files are damaged, and
        MemoryError if weights and cache exceed the device's memory.
        """
        max_seq_len = whole("max_seq_len", max_seq_len, 1)
        max_batch_size = whole("max_batch_size", max_batch_size, 1)
        max_images, vision = whole("max_images", max_images, 0), flag("vision", vision)
        seed, batch_invariant = whole("seed", seed), flag("batch_invariant", batch_invariant)
        if model_parallel_size is not None:
            model_parallel_size = whole("model_parallel_size", model_parallel_size, 1)
        device = parse_device(device) if device is not None else default_device()
        dtype = parse_dtype(dtype) if dtype is not None else None
        check_quantize(quantize, device)
        if compile is True and batch_invariant:
            raise ArgumentError("compile=True and batch_invariant=True cannot be combined: choose one")
        compiles = check_compile(compile, device) and not batch_invariant
        group = ranks.connect(model_parallel_size, device)
        try:
            with ranks.together(group):
                checkpoint = open_checkpoint(ckpt_dir, tokenizer_path, adapter)
                scheme = scheme_of(checkpoint, quantize)
                params = checkpoint.params if vision else text_params(checkpoint.params)
                args = make_args(params, max_seq_len, max_batch_size, max_images)
                model = load(
                    checkpoint,
                    args,
                    group,
                    device,
                    dtype,
                    scheme,
                    whole_steps=whole_steps and not compiles,
                    mapped=mmap,
                    threads=threads,
                )
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
            ranks.disconnect()
            raise
        llama._connected = True
        llama.quantization = scheme
        llama.classifier = checkpoint.classifier
        llama.tool_format = default_format(checkpoint.family, checkpoint.formatter)
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
        """formatter: chat format for dialogs; by default the tokenizer's own. The rest: see `Engine`."""
        self.model, self.tokenizer = model, tokenizer
        self.formatter = formatter or chat_format(tokenizer)
        self.engine = Engine(
            model,
            # A GPU needs more rows per matrix product than a CPU to be efficient.
            prefill_chunk=2048 if model.device.type == "cuda" else 512,
            batch_invariant=batch_invariant,
            static=static,
        )
        self._seed = seed
        self._seeds = itertools.count(1)  # of requests without a seed of their own
        self._connected = False

    @property
    def sees(self) -> bool:
        """Whether the model accepts images."""
        return isinstance(self.model, VisionTransformer)

    def close(self) -> None:
        """Leave the process group that `build` joined; the last to leave destroys it."""
        if self._connected:
            self._connected = False
            self.engine.close()
            ranks.disconnect()

    def forget(self) -> None:
        """Discard the KV cache's contents after weights were edited in a way PyTorch does not record.

        In-place edits and `load_state_dict` are noticed; writes through `.data` or NumPy are not.
        """
        self.engine.forget()

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(
        self,
        prompt_tokens: Iterable[Iterable[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **sampling: Unpack[Sampling],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue prompts of token ids, each until a stop token, which is not returned.

        prompt_tokens: any number of lists, tuples, arrays or tensors; `max_batch_size` run at a time.
        The rest: see `Options`.

        Returns the token ids of each answer and, with `logprobs`, their log-probabilities, else None.
        Raises PromptError for a prompt that is empty, leaves no room for an answer or has unknown ids;
        ArgumentError for options that are unknown or out of range, or if there are no prompts.
        """
        if sampling.get("top_logprobs"):
            raise ArgumentError("generate returns no top_logprobs; text_completion and the streams do")
        basic = Basic(
            temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, logprobs=logprobs, echo=echo
        )
        answers = collect(self.stream_tokens(prompt_tokens, **basic, **sampling))
        return [a.tokens for a in answers], [a.logprobs for a in answers] if logprobs else None

    def text_completion(
        self,
        prompts: Iterable[str | Sequence[Any]],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **sampling: Unpack[Sampling],
    ) -> list[CompletionPrediction]:
        """Continue texts, or lists of parts with images (see `tokenizer.content`).

        Raises what `generate` raises.
        Returns for each answer its text and why it ended (see `StreamEvent`), and with `logprobs` the
        fields of `Scored`.
        """
        basic = Basic(
            temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, logprobs=logprobs, echo=echo
        )
        answers = collect(self.stream_text(prompts, **basic, **sampling))
        return [completion_prediction(answer, self.tokenizer, logprobs) for answer in answers]

    def chat_completion(
        self,
        dialogs: Iterable[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: Unpack[ChatSampling],
    ) -> list[ChatPrediction]:
        """Answer dialogs: lists of messages, see `Message`.

        If the last message is the assistant's, the answer continues it.
        options: see `Sampling` and `DialogOptions`.

        Returns what `text_completion` returns, but with each text as an assistant message that includes
        any tool calls. Raises what `generate` raises, and ArgumentError for a dialog that the chat
        format cannot represent.
        """
        basic = Basic(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, logprobs=logprobs)
        answers = collect(self.stream_chat(dialogs, **basic, **options))
        return [chat_prediction(answer, self.tokenizer, logprobs) for answer in answers]

    def stream_text(
        self, prompts: Iterable[str | Sequence[Any]], **options: Unpack[Options]
    ) -> Generator[StreamEvent, None, None]:
        """Like `text_completion`, but yields an event for each token and one for the end of each answer.

        Joined, the pieces of text are the answer of `text_completion`. With `echo` the prompt's tokens
        come first. Several streams may be read alternately. Closing or dropping a stream cancels its
        unfinished requests and frees their slots. If a request fails, its last event says why and the
        others continue. Raises what `generate` raises, when called.
        """
        ids, options["images"] = encode_texts(prompts, self.model, self.tokenizer)
        return self.stream_tokens(ids, **options)

    def stream_chat(
        self, dialogs: Iterable[Dialog], **options: Unpack[ChatOptions]
    ) -> Generator[StreamEvent, None, None]:
        """Like `chat_completion`, but as a stream; see `stream_text`."""
        return stream(self.engine, self.tokenizer, self.chat_requests(dialogs, **options))

    def stream_tokens(
        self, prompt_tokens: Iterable[Iterable[int]], **options: Unpack[Options]
    ) -> Generator[StreamEvent, None, None]:
        """Like `stream_text`, for prompts of token ids."""
        return stream(self.engine, self.tokenizer, self.requests(prompt_tokens, **options))

    def astream_text(
        self, prompts: Iterable[str | Sequence[Any]], **options: Unpack[Options]
    ) -> AsyncGenerator[StreamEvent, None]:
        """`stream_text` for asyncio: `async for event in llama.astream_text([...])`."""
        ids, options["images"] = encode_texts(prompts, self.model, self.tokenizer)
        return astream(self.engine, self.tokenizer, self.requests(ids, **options))

    def astream_chat(
        self, dialogs: Iterable[Dialog], **options: Unpack[ChatOptions]
    ) -> AsyncGenerator[StreamEvent, None]:
        """`stream_chat` for asyncio: `async for event in llama.astream_chat([...])`."""
        requests = functools.partial(self.chat_requests, dialogs, **options)
        # A guard checks the questions first, which must not block other tasks.
        return astream(self.engine, self.tokenizer, requests if options.get("guard") else requests())

    def requests(
        self, prompt_tokens: Iterable[Iterable[int]], **options: Unpack[Options]
    ) -> list[TextRequest]:
        """Check a call's arguments and build its requests without running them.

        Raises what `generate` raises.
        """
        images = [[tiled(image, self.model) for image in prompt] for prompt in options.pop("images", ())]
        stops, check = self.tokenizer.stop_tokens, self.engine.check
        return text_requests(
            prompt_tokens, options, stops, check, self._next_seed, lambda: self.grammars, images
        )

    def chat_requests(self, dialogs: Iterable[Dialog], **options: Unpack[ChatOptions]) -> list[TextRequest]:
        """`requests` for dialogs. Raises what `chat_completion` raises."""
        values: dict[str, Any] = dict(options)
        use = ToolUse.parse(
            values.pop("tools", None),
            values.pop("tool_choice", "auto"),
            values.pop("tool_format", None) or self.tool_format,
            values.pop("parallel_tool_calls", True),
        )
        guard, every = values.pop("guard", None), values.pop("guard_every", None)
        if use.schema is not None:
            if any(values.get(name) is not None for name in SHAPES):
                raise ArgumentError("a required tool call cannot be combined with schema, regex or grammar")
            values["schema"] = use.schema
        dialogs, ids, images = encode_dialogs(use, dialogs, self.model, self.tokenizer, self.formatter)
        requests = self.requests(ids, images=images, **values)
        checks = reviews(guard, dialogs, every) if guard else [None] * len(dialogs)
        n = len(requests) // len(dialogs)
        return [
            replace(request, tools=use.parser(dialogs[i // n]), review=checks[i // n])
            for i, request in enumerate(requests)
        ]

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles constraints for this model's tokenizer."""
        return Grammars(self.tokenizer, self.model.params.vocab_size)

    def _next_seed(self) -> int:
        return derive_seed(self._seed, next(self._seeds))
