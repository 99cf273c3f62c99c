"""The command that asks a Llama Guard."""

import json as jsonlib
from dataclasses import asdict
from typing import Any, Literal

from llama.cli.options import BuildOptions, check_prompt, read_prompt
from llama.cli.terminal import Terminal
from llama.errors import ArgumentError
from llama.guard import Guard, Verdict


def guard(
    ckpt_dir: str,
    text: str | None = None,
    *,
    file: str | None = None,
    version: Literal["1", "2", "3-8b", "3-1b", "4"] | None = None,
    exclude: tuple[str, ...] = (),
    json: bool = False,
    build: BuildOptions = BuildOptions(),
) -> None:
    """Tell whether a text, or the last message of a dialog, is safe.

    Args:
        ckpt_dir: folder of a Llama Guard, a GGUF file, a URL, or a Hugging Face repository
        text: what a user wrote, or a dialog as a JSON list of messages; by default the text of --file,
            or the standard input
        file: a file of UTF-8 text that holds the text or the dialog
        version: which Llama Guard it is; by default what its files tell
        exclude: a category that is allowed; a JSON list for several
        json: print one JSON object: safe, categories, unsafe_probability, role, text
    """
    check_prompt(text, file)
    with build.build(ckpt_dir) as llama:
        read = read_prompt(text, file, Terminal(llama.model.parallel))
        verdict = Guard(llama, version).check(parse_dialog(read), excluded=exclude)
        print(jsonlib.dumps(asdict(verdict), ensure_ascii=False) if json else as_text(verdict))


def parse_dialog(text: str) -> Any:
    """The dialog that a text is, or what a user wrote. Raises ArgumentError for a list of something else."""
    try:
        dialog = jsonlib.loads(text)
    except ValueError:
        dialog = None
    if not isinstance(dialog, list):
        return [{"role": "user", "content": text}]
    if not dialog or not all(isinstance(message, dict) for message in dialog):
        raise ArgumentError('a dialog must be a JSON list of messages: [{"role": "user", "content": "…"}]')
    return dialog


def as_text(verdict: Verdict) -> str:
    """A verdict, as lines of text."""
    lines = [f"{category.code} {category.name}" for category in verdict.categories]
    sure = f"{'safe' if verdict.safe else 'unsafe'} (probability of unsafe: {verdict.unsafe_probability:.1%})"
    return "\n".join([sure, *lines])
