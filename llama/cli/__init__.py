"""The `llama` command: `llama NAME ...`, `python -m llama NAME ...`, or under torchrun.

A command is a function in a module of the same name in this package, and a line in COMMANDS.
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
    "serve": "serve a model over HTTP, with OpenAI's and Anthropic's APIs",
    "guard": "check whether a text is safe, with a Llama Guard model",
    "info": "show what a checkpoint is and how much memory it needs",
    "convert": "convert a checkpoint to another format, number of files, or precision",
    "bench": "measure a model's speed, compared with this machine's limits",
    "perplexity": "measure how well a model predicts a text",
}
LISTED = "\n".join(f"  {name:<13} {summary}" for name, summary in COMMANDS.items())
HELP = f"""\
usage: llama COMMAND ...

{LISTED}

  help COMMAND  show the arguments of a command
  completion    print a script for bash or fish: source <(llama completion bash)
  --version     print the version

On several ranks: torchrun --nproc_per_node N -m llama COMMAND ..."""


def main() -> None:
    """Run the command named on the command line."""
    name, *words = sys.argv[1:] or ["help"]
    if name in ("help", "-h", "--help"):
        name, words = (words[0], ["--help"]) if words else ("help", [])
    if name in ("help", "--version"):
        print(HELP if name == "help" else __version__)
    else:
        launch(completion if name == "completion" else load(name), words, f"llama {name}")


def completion(shell: Literal["bash", "fish"] = "bash") -> None:
    """Print a shell script that completes commands and flags.

    Args:
        shell: which shell
    """
    flags = {name: _as_function(options_of(load(name))) for name in COMMANDS}
    print(Script("llama", {**flags, "completion": completion}, shell=shell))


def load(name: str) -> Callable[..., Any]:
    """The function of a command. If there is none, exits and suggests the nearest name."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "llama help lists them"
        sys.exit(f"error: unknown command {name!r}; {hint}")
    handler = signal.getsignal(signal.SIGINT)
    try:
        if handler is signal.default_int_handler:
            # Importing torch takes seconds; Ctrl-C in that time exits without a traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return getattr(import_module(f"llama.cli.{name}"), name)
    finally:
        signal.signal(signal.SIGINT, handler)


def _as_function(flags: Sequence[Option]) -> Callable[..., None]:
    """A function with these parameters, from which fire reads the flags."""

    def function() -> None: ...

    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=None) for flag in flags]
    )
    return function
