"""The `llama` command: `llama NAME ...`, `python -m llama NAME ...`, or under torchrun.

A command is a function in a module of this package, both of its name, and a line in COMMANDS.
"""

import difflib
import inspect
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal

from fire.completion import Script

from llama import __version__
from llama.cli.arguments import Option, options_of
from llama.cli.launch import launch

COMMANDS = {
    "chat": "chat with a model in the terminal",
    "ask": "answer one question",
    "complete": "continue a text",
    "serve": "serve a model to clients of OpenAI's and Anthropic's interfaces",
    "guard": "tell whether a text is safe, by a Llama Guard",
    "info": "what a checkpoint is, and what memory it takes to run",
    "convert": "write a checkpoint in another format, number of files, or precision",
    "bench": "how fast a model runs here, beside what this machine can do",
    "perplexity": "how well a model predicts a text",
}
LISTED = "\n".join(f"  {name:<13} {summary}" for name, summary in COMMANDS.items())
HELP = f"""\
usage: llama COMMAND ...

{LISTED}

  help COMMAND  what its arguments are
  completion    print a script for bash or fish: source <(llama completion bash)
  --version     print the version

On several ranks: torchrun --nproc_per_node N -m llama COMMAND ..."""


def main() -> None:
    """Run the command that the command line names."""
    name, *words = sys.argv[1:] or ["help"]
    if name in ("help", "-h", "--help"):
        name, words = (words[0], ["--help"]) if words else ("help", [])
    if name in ("help", "--version"):
        print(HELP if name == "help" else __version__)
    else:
        launch(completion if name == "completion" else load(name), words, f"llama {name}")


def completion(shell: Literal["bash", "fish"] = "bash") -> None:
    """Print a script that makes a shell complete commands and flags.

    Args:
        shell: which one
    """
    flags = {name: _as_function(options_of(load(name))) for name in COMMANDS}
    print(Script("llama", {**flags, "completion": completion}, shell=shell))


def load(name: str) -> Callable[..., Any]:
    """The function of a command. Leaves the program, with the nearest name, if there is none."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "llama help lists them"
        sys.exit(f"error: unknown command {name!r}; {hint}")
    handler = signal.getsignal(signal.SIGINT)
    try:
        if handler is signal.default_int_handler:
            # Importing torch takes seconds; until then Ctrl-C ends the program without a stack.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return getattr(import_module(f"llama.cli.{name}"), name)
    finally:
        signal.signal(signal.SIGINT, handler)


def _as_function(flags: Sequence[Option]) -> Callable[..., None]:
    """A function with these parameters, which is what fire reads flags from."""

    def function() -> None: ...

    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=None) for flag in flags]
    )
    return function
