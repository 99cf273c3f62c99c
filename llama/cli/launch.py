"""Run a command on one rank or many: output from one rank only, exit codes, errors without tracebacks."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from llama.cli.arguments import parse, usage
from llama.errors import ArgumentError, LlamaError, RankError

DEMO = "SmolLM2-135M-Instruct"


def launch(
    command: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    words: Sequence[str] | None = None,
    name: str | None = None,
) -> None:
    """Call a command, or the one in a table that the first word names, and exit on an error.

    Only rank 0 prints. A user's mistake or a lost rank prints one message without a traceback, and every
    rank exits with 1; $LLAMA_TRACEBACK=1 shows the traceback. Any other exception is a bug in this
    package and keeps its traceback.

    words: arguments on the command line; by default the program's.
    name: of the program, as typed; by default the script's.
    """
    words = sys.argv[1:] if words is None else words
    name = name or Path(sys.argv[0]).name
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if torchrun:
        signal.signal(signal.SIGTERM, _terminated)
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", 0)) > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            if isinstance(command, Mapping):
                first, *words = words or [""]
                if first not in command:
                    raise ArgumentError(f"{name}: expected one of {', '.join(command)}, not {first!r}")
                command, name = command[first], f"{name} {first}"
            if {"-h", "--help"} & {*words}:
                print(usage(command, name))
            else:
                command(**parse(command, words, name))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (LlamaError, OSError) as error:
            if os.environ.get("LLAMA_TRACEBACK") or not _is_sentence(error):
                raise
            if torchrun:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is exiting already
            sys.exit(f"error: {error}" if _first_to_fail() else 1)
        except KeyboardInterrupt:
            sys.exit(130)


def _is_sentence(error: Exception) -> bool:
    """Whether an error is for the user to fix: ours, or the system's about a path the user gave.

    The system's errors have a number; those that this package raises have only a message.
    """
    return not isinstance(error, OSError) or error.errno is None or error.filename is not None


def _terminated(*_: object) -> None:
    raise RankError(
        f"rank {os.environ['RANK']} was stopped by torchrun, probably because another rank failed; "
        "look at the first failure"
    )


def default_ckpt_dir() -> str:
    """The demo model's folder in this one. If there is none, raises FileNotFoundError with alternatives."""
    if Path(DEMO).is_dir():
        return DEMO
    raise FileNotFoundError(
        "no checkpoint given, and the demo model is not here. Three ways to get weights:\n"
        f"  the open demo model      ./download.sh {DEMO}\n"
        "  Meta's, by signed URL    ask at https://www.llama.com/llama-downloads, then ./download.sh\n"
        "  Meta's, on Hugging Face  pass a repository's name, such as meta-llama/Llama-3.2-1B-Instruct\n"
        "and then pass --ckpt_dir FOLDER"
    )


def _first_to_fail() -> bool:
    """Whether this rank is the first to ask. Any rank may be the one that died, even rank 0."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # takes a second to import

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add("llama/failed", 1) == 1
    except (KeyError, RuntimeError):
        return True
