"""Run a command line on one rank or many: arguments by fire, output once, errors as one sentence."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import fire
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from llama.errors import RankError


def launch(command: Callable[..., Any] | Mapping[str, Callable[..., Any]], name: str | None = None) -> None:
    """Call a command, or the one of a table that the first argument names, and leave the program.

    Only rank 0 prints. A mistake of the user's, or a lost rank, is said once and without a stack,
    and every rank exits with 1; anything else is a fault of the program, and keeps its stack.
    """
    rank = int(os.environ.get("RANK", 0))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, _terminated)
    with contextlib.ExitStack() as stack:
        if rank > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            fire.Fire(command, name=name)
        except (OSError, ValueError, MemoryError, ImportError, RankError) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is leaving already
            sys.exit(f"error: {error}" if _first_to_fail() else 1)
        except KeyboardInterrupt:
            sys.exit(130)


def _terminated(*_: object) -> None:
    raise RankError(
        f"rank {os.environ['RANK']} was stopped by torchrun, as happens when another rank has failed; "
        "the first failure is the one to look at"
    )


DEMO = "SmolLM2-135M-Instruct"


def default_ckpt_dir() -> Path:
    """The demo model's folder, in this one. Raises FileNotFoundError, with ways to get weights."""
    if (folder := Path(DEMO)).is_dir():
        return folder
    raise FileNotFoundError(
        f"no --ckpt_dir given, and the demo model is not here. Three ways to get weights:\n"
        f"  the open demo model     ./download.sh {DEMO}\n"
        "  Meta's, by signed URL   ask at https://www.llama.com/llama-downloads, then ./download.sh\n"
        "  Meta's, on Hugging Face download a repository's original/ folder\n"
        "and then pass --ckpt_dir FOLDER"
    )


def _first_to_fail() -> bool:
    """Whether this rank is the first that asks. Any rank may be the one that died, 0 too."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add("llama/failed", 1) == 1
    except (KeyError, RuntimeError):
        return True
