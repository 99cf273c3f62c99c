"""Many threads, one of which at a time runs the model for all of them."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama.errors import LlamaError


class Turns:
    """Whose turn it is to run the model.

    lock: protects what the threads share; it is not held while the model runs.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition()  # notified after every turn; reentrant
        self.leader: int | None = None  # the thread whose turn it is
        self._process: int | None = None  # the process that has run the model

    @contextmanager
    def turn(self, until: Callable[[], bool]) -> Iterator[bool]:
        """Wait for this thread's turn until `until` is true, and yield whether the turn has come."""
        self.check_process()
        me = threading.get_ident()
        try:
            with self.lock:
                while not until():
                    if self.leader in (None, me):
                        self.leader, self._process = me, os.getpid()
                        break
                    self.lock.wait(1)  # an interrupted thread may not have notified anyone
            yield self.leader == me
        finally:
            if self.leader == me:
                self.leader = None
                with self.lock:
                    self.lock.notify_all()

    def check_process(self) -> None:
        """Raise LlamaError in a child that was forked after its parent ran the model."""
        if self._process not in (None, os.getpid()):
            raise LlamaError(
                "this process was forked after the model had generated, and threads do not survive a fork: "
                'build the model in the child, or use multiprocessing\'s "spawn" start method'
            )
