"""Llama Guard: is a user's question, or an assistant's answer, safe?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from llama.errors import ArgumentError
from llama.generation import Llama, StrPath
from llama.guard.prompt import (
    VERSIONS,
    GuardVersion,
    Judged,
    check_conversation,
    guard_version,
    parse_verdict,
)
from llama.moderation import Category
from llama.predictions import collect
from llama.prompts import with_image_token
from llama.tokenizer import Dialog, SentencePieceTokenizer
from llama.tokenizer.content import is_parts, split_dialog, text_of
from llama.tokenizer.template import ChatTemplate
from llama.vision import VisionArgs

__all__ = ["Category", "Guard", "Verdict", "guard_version"]

# Room for a verdict that names every category.
MAX_VERDICT = 64
# Look for the words "safe" and "unsafe" among this many most likely tokens.
TOP_WORDS = 20


@dataclass(frozen=True)
class Verdict:
    """A guard's verdict on the last message of a dialog.

    safe: whether the guard's answer begins with "safe".
    categories: the hazard categories it names if not; empty if its answer cannot be parsed.
    unsafe_probability: of "unsafe" relative to "safe", where the guard writes one of the two.
    role: whose message was judged.
    text: the guard's answer.
    """

    safe: bool
    categories: tuple[Category, ...]
    unsafe_probability: float
    role: Judged
    text: str


class Guard:
    """A Llama Guard model with its prompt.

    version: which version it is.
    """

    def __init__(self, llama: Llama, version: str | None = None) -> None:
        """version: a name in `VERSIONS`, such as "3-8b"; by default recognised from the checkpoint's files.

        Raises ArgumentError if the version is unknown or cannot be recognised.
        """
        self.llama = llama
        self.version: GuardVersion = guard_version(version) if version is not None else recognize(llama)

    @staticmethod
    def build(
        ckpt_dir: StrPath,
        version: str | None = None,
        max_seq_len: int = 4096,
        max_batch_size: int = 4,
        **options: Any,
    ) -> Guard:
        """Load a Llama Guard. Raises what `Llama.build` and `Guard` raise.

        version: a name in `VERSIONS`, such as "3-8b"; by default recognised from the checkpoint's files.
        ckpt_dir, max_seq_len, max_batch_size, options: arguments of `Llama.build`.
        """
        llama = Llama.build(ckpt_dir, max_seq_len=max_seq_len, max_batch_size=max_batch_size, **options)
        return Guard(llama, version)

    @overload
    def check(
        self, dialog: Dialog, *, categories: Mapping[str, str] | None = ..., excluded: Collection[str] = ...
    ) -> Verdict: ...

    @overload
    def check(
        self,
        dialog: Sequence[Dialog],
        *,
        categories: Mapping[str, str] | None = ...,
        excluded: Collection[str] = ...,
    ) -> list[Verdict]: ...

    def check(
        self,
        dialog: Dialog | Sequence[Dialog],
        *,
        categories: Mapping[str, str] | None = None,
        excluded: Collection[str] = (),
    ) -> Verdict | list[Verdict]:
        """Judge the last message of a dialog, or of each of several dialogs.

        dialog: alternating messages of user and assistant, or a list of such dialogs, which run as a
            batch. Llama Guard 3 11B Vision sees only the last image.
        categories: codes and their descriptions, such as {"C1": "Spoilers."}, instead of the model's own.
        excluded: codes of categories to ignore.

        Raises ArgumentError for invalid dialogs or unknown codes, PromptError if a dialog is too long.
        """
        if isinstance(dialog, Sequence) and dialog and isinstance(dialog[0], Mapping):
            return self._check([dialog], categories, excluded)[0]  # type: ignore[list-item]
        return self._check(dialog, categories, excluded)  # type: ignore[arg-type]

    def _check(
        self, dialogs: Sequence[Dialog], categories: Mapping[str, str] | None, excluded: Collection[str]
    ) -> list[Verdict]:
        tokenizer, version = self.llama.tokenizer, self.version
        prefix = (
            tokenizer.encode(version.answer_prefix, bos=False, eos=False) if version.answer_prefix else []
        )
        split = [self._split(dialog) for dialog in dialogs]
        dialogs, images = [dialog for dialog, _ in split], [found for _, found in split]
        prompts = [
            version.encode(tokenizer, dialog, categories, excluded, image=bool(found)) + prefix
            for dialog, found in zip(dialogs, images, strict=True)
        ]
        if any(images):
            prompts = [with_image_token(prompt, self.llama.model, tokenizer) for prompt in prompts]
        events = self.llama.stream_tokens(
            prompts,
            images=images,
            temperature=0,
            max_gen_len=MAX_VERDICT,
            logprobs=True,
            top_logprobs=TOP_WORDS,
        )
        known = version.categories if categories is None else categories
        safe, unsafe = (tokenizer.encode(word, bos=False, eos=False)[0] for word in ("safe", "unsafe"))
        verdicts = []
        for dialog, answer in zip(dialogs, collect(events), strict=True):
            logprobs = dict(answer.top_logprobs[0]) if answer.top_logprobs else {}
            odds = logprobs.get(unsafe, -math.inf), logprobs.get(safe, -math.inf)
            is_safe, named = parse_verdict(answer.text, known)
            # If neither word is among the likely ones, the parsed answer decides.
            probability = (
                float(not is_safe) if max(odds) == -math.inf else 1 / (1 + math.exp(odds[1] - odds[0]))
            )
            verdicts.append(
                Verdict(is_safe, named, probability, check_conversation(dialog), answer.text.strip())
            )
        return verdicts

    def _split(self, dialog: Dialog) -> tuple[Dialog, list[Any]]:
        """A dialog as text, and the image that is judged with it: the last one, if any."""
        messages, images = split_dialog(dialog)
        if images and not self.version.sees:
            raise ArgumentError(f"Llama Guard {self.version.name} reads text only: leave the images out")
        if images:
            messages = [
                {**message, "content": text_of(message["content"])}
                if is_parts(message.get("content"))
                else message  # refused where it is rendered, unless it is text
                for message in messages
            ]
        return messages, images[-1:]

    def close(self) -> None:
        """Close the model; see `Llama.close`."""
        self.llama.close()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def recognize(llama: Llama) -> GuardVersion:
    """Which Llama Guard a model is, judging by its chat template, or its vocabulary and shape."""
    if isinstance(llama.formatter, ChatTemplate):
        source = llama.formatter.source
        tells = {
            "4": "<|header_start|>",
            "3-1b": "excluded_category_keys",
            "3-8b": "S14: ",
            "2": "S11: ",
            "1": "O6: ",
        }
        for name, text in tells.items():
            if text in source and "<BEGIN UNSAFE CONTENT CATEGORIES>" in source:
                return VERSIONS[name]
        if "<BEGIN UNSAFECONTENT CATEGORIES>" in source:
            return VERSIONS["3-11b-vision"]
        raise ArgumentError(
            "this checkpoint's chat template is not Llama Guard's; "
            f"if the model is a Llama Guard, pass version=, one of {', '.join(VERSIONS)}"
        )
    if isinstance(llama.tokenizer, SentencePieceTokenizer):
        return VERSIONS["1"]
    if "<|header_start|>" in llama.tokenizer.special_tokens:
        return VERSIONS["4"]
    args = llama.model.params
    if isinstance(args, VisionArgs):
        return VERSIONS["3-11b-vision"]
    if not args.use_scaled_rope:
        return VERSIONS["2"]
    return VERSIONS["3-8b" if args.dim >= 4096 else "3-1b"]
