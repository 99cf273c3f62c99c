"""The command that checks a text with a Llama Guard."""

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
    """Check whether a text, or the last message of a dialog, is safe.

    Args:
        ckpt_dir: folder of a Llama Guard, a GGUF file, a URL, or a Hugging Face repository
        text: a user's message, or a dialog as a JSON list of messages; by default the text of --file,
            or standard input
        file: a UTF-8 text file that contains the message or the dialog
        version: version of Llama Guard; by default recognised from its files
        exclude: a category to ignore; a JSON list for several
        json: print one JSON object: safe, categories, unsafe_probability, role, text
    """
    check_prompt(text, file)
    with build.build(ckpt_dir) as llama:
        read = read_prompt(text, file, Terminal(llama.model.parallel))
        verdict = Guard(llama, version).check(parse_dialog(read), excluded=exclude)
        print(jsonlib.dumps(asdict(verdict), ensure_ascii=False) if json else as_text(verdict))


def parse_dialog(text: str) -> Any:
    """The dialog in a text, or the text as a user's message. Raises ArgumentError for any other list."""
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
    """A verdict as lines of text."""
    lines = [f"{category.code} {category.name}" for category in verdict.categories]
    sure = f"{'safe' if verdict.safe else 'unsafe'} (probability of unsafe: {verdict.unsafe_probability:.1%})"
    return "\n".join([sure, *lines])
