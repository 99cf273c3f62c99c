"""Keyboard input for a program on one rank or many: rank 0 reads it, and every rank receives it.

Ctrl-C is read as a key, not received as a signal: under `torchrun` the signal would go to the launcher,
which ends all ranks.
"""

import contextlib
import datetime
import glob
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from llama.errors import ArgumentError
from llama.parallel import ModelParallel
from llama.ranks import lost_rank_as_error

try:
    import readline
    import termios
except ImportError:  # Windows: plain input, and Ctrl-C ends the program
    readline = termios = None  # type: ignore[assignment]

T = TypeVar("T")
CTRL_C = b"\x03"
KEPT = 1000  # lines of history


class Terminal:
    """Reads lines, and detects Ctrl-C in between. Every rank must make the same calls.

    parallel: the ranks.
    commands: words that begin with a slash; Tab completes them, and file names after them.
    history: whether to keep typed lines for later sessions.
    Raises ArgumentError if the model is on only some of the ranks.
    """

    def __init__(self, parallel: ModelParallel, commands: Iterable[str] = (), history: bool = False) -> None:
        self.parallel = parallel
        self.commands = sorted(commands)
        self.history = history
        self.interactive = sys.stdin.isatty() and termios is not None
        self._typed = ""  # ahead of the next prompt
        self._group: dist.ProcessGroup | None = None
        if parallel.size > 1:
            if parallel.size != dist.get_world_size():
                raise ArgumentError(
                    f"this needs one model across all {dist.get_world_size()} ranks, not one per "
                    f"{parallel.size} ranks"
                )
            # The other ranks wait as long as the user takes to type.
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))

    def once(self, act: Callable[[], T]) -> T:
        """Call `act` on rank 0 only. Returns its result, or raises its exception, on every rank."""
        if self._group is None:
            return act()
        outcome: list[Any] = [None, None]
        if self.parallel.rank == 0:
            try:
                outcome[0] = act()
            except Exception as error:
                outcome[1] = error
        with lost_rank_as_error(self.parallel):
            dist.broadcast_object_list(outcome, 0, self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def read_line(self, prompt: str) -> str | None:
        """The next message; None at the end of the input (Ctrl-D).

        A message is a line, plus the next lines while each ends with a backslash, or a pasted block:
        lines that the terminal delivers at once. A command is always one line.
        """
        lines: list[str] = []
        while (line := self.once(lambda: self._read(prompt if not lines else "… "))) is not None:
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
        return "\n".join(lines) if lines else None

    def _read(self, prompt: str) -> str | None:
        prompt = prompt if self.interactive else ""
        line, newline, rest = self._typed.partition("\n")
        self._typed = rest
        if newline:  # typed ahead
            print(prompt + line)
            return line
        if readline and line:
            readline.set_startup_hook(lambda: readline.insert_text(line))
        try:
            lines = [input(prompt)]
            with contextlib.suppress(EOFError):
                while self._more() and not self._is_command(lines[0]):
                    lines.append(input())
            return "\n".join(lines)
        except EOFError:
            if self.interactive:
                print()
            return None
        finally:
            if readline:
                readline.set_startup_hook()

    def _more(self) -> bool:
        """Whether the terminal has delivered more than the line just read."""
        return self.interactive and bool(select.select([sys.stdin], [], [], 0)[0])

    def _is_command(self, line: str) -> bool:
        return line.startswith("/") and not line.startswith("//")

    def interrupted(self) -> bool:
        """Whether Ctrl-C was typed since the last call, within `watching`."""
        return self.once(self._poll)

    def _poll(self) -> bool:
        stdin = sys.stdin.fileno() if self.interactive else -1
        data = b""
        while self.interactive and select.select([stdin], [], [], 0)[0]:
            new = os.read(stdin, 1024)
            if not new:
                break
            data += new
        if CTRL_C in data:
            self._typed = ""
            return True
        if b"\x1b" not in data:  # no arrow keys and the like
            self._typed += data.decode("utf-8", "ignore")
        return False

    @contextlib.contextmanager
    def ctrl_c_as_key(self) -> Iterator[None]:
        """A context in which Ctrl-C is a key; at the prompt it clears the line."""
        if self.parallel.rank != 0 or not self.interactive:
            yield
            return
        editline = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind('bind "^C" vi-kill-line-prev' if editline else r'"\C-c": kill-whole-line')
        readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: complete")
        readline.set_completer_delims(" ")
        readline.set_completer(self._completed)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_settings(lambda mode: mode[6].__setitem__(termios.VINTR, b"\x00")))
            if self.history:
                stack.enter_context(kept_history())

            def end(*_: object) -> None:
                # Not an exception, which would be lost if the signal arrived in a destructor.
                stack.close()
                os.kill(os.getpid(), signal.SIGTERM)

            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                stack.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGTERM, end)
            yield

    def _completed(self, word: str, n: int) -> str | None:
        """The n-th completion of the word before the cursor, as readline asks for them."""
        line = readline.get_line_buffer()
        if " " not in line:
            found = [command for command in self.commands if command.startswith(line)] if line else []
        else:
            found = sorted(glob.glob(f"{glob.escape(word)}*")) if self._is_command(line) else []
        return found[n] if n < len(found) else None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which keys are not echoed, and `interrupted` sees them as they are typed."""
        if self.parallel.rank != 0 or not self.interactive:
            yield
            return

        def change(mode: list[Any]) -> None:
            mode[3] &= ~(termios.ICANON | termios.ECHO)

        with _settings(change):
            yield


@contextlib.contextmanager
def kept_history() -> Iterator[None]:
    """A context whose lines are kept in $XDG_STATE_HOME/llama/history, readable only by the user."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "llama" / "history"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(KEPT)
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


@contextlib.contextmanager
def _settings(change: Callable[[list[Any]], None]) -> Iterator[None]:
    """A context with changed terminal settings, in tcgetattr's form."""
    stdin = sys.stdin.fileno()
    before, mode = termios.tcgetattr(stdin), termios.tcgetattr(stdin)
    change(mode)
    termios.tcsetattr(stdin, termios.TCSADRAIN, mode)
    try:
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
