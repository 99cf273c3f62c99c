"""The one thread that runs the engine, and how other ranks follow it.

Rank 0 speaks HTTP. Before each step it broadcasts what was added and cancelled since the last step, so all
ranks make the same engine calls in the same order, whenever requests arrive.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llama.arguments import TextRequest
from llama.constraints import GrammarConstraint
from llama.engine import Event, Request
from llama.errors import ArgumentError, RankError
from llama.generation import Llama
from llama.sampling import SamplingParams
from llama.vision import TiledImage

Once = Callable[[Callable[[], "Plan"]], "Plan"]  # calls a function on rank 0 and broadcasts its result


class Order(NamedTuple):
    """A request in a form that can be broadcast. grammar: text of its constraint; see `llama.constraints`."""

    number: int
    prompt: list[int]
    params: SamplingParams
    images: Sequence[TiledImage]
    grammar: str | None


class Job(NamedTuple):
    """A call that every rank makes between two steps. function: its name; see `Driver.jobs`."""

    function: str
    arguments: Sequence[Any]


@dataclass
class Plan:
    """What changes before a step. Requests are identified by number.

    closing: no step follows, and the engine is not used any more.
    """

    added: list[Order] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    job: Job | None = None
    closing: bool = False

    def __bool__(self) -> bool:
        return bool(self.added or self.cancelled or self.closing)


@dataclass(eq=False)
class Ticket:
    """A submitted request.

    deliver: receives the engine's request and its events, on the driver's thread; it must return quickly.
    """

    number: int
    deliver: Callable[[Request, Sequence[Event]], object]
    told: int = 0  # events delivered so far


class Driver:
    """Runs the engine of a model that nothing else uses, on its own thread.

    once: see `Once`.
    jobs: functions that run between steps, by name. Every rank calls them with the same arguments.
    failure: the exception that ended it, if any.
    """

    failure: BaseException | None = None

    def __init__(
        self, llama: Llama, once: Once, jobs: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        self.llama = llama
        self.jobs = jobs or {}
        self._once = once
        self._numbers = itertools.count()
        self._tickets: dict[int, Ticket] = {}  # submitted and not ended
        self._next = Plan()
        self._calls: deque[tuple[Job, Future[Any]]] = deque()  # not started
        self._call: Future[Any] | None = None  # the running one
        self._changed = threading.Condition()  # guards the four above
        self._thread: threading.Thread | None = None

    def start(self, fail: Callable[[], object]) -> None:
        """Start the thread. fail: called on the driver's thread if it cannot continue."""
        self._thread = threading.Thread(target=self._drive, args=(fail,), name="engine", daemon=True)
        self._thread.start()

    def submit(self, source: TextRequest, deliver: Callable[[Request, Sequence[Event]], object]) -> Ticket:
        """Submit a request, from any thread. Raises RankError if the driver has ended."""
        with self._changed:
            self._check_open()
            ticket = Ticket(next(self._numbers), deliver)
            self._tickets[ticket.number] = ticket
            grammar = source.constraint.text if isinstance(source.constraint, GrammarConstraint) else None
            self._next.added.append(
                Order(ticket.number, source.prompt, source.params, source.images, grammar)
            )
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request before the next step. Has no effect on a request that has ended."""
        with self._changed:
            if ticket.number in self._tickets:
                self._next.cancelled.append(ticket.number)
                self._changed.notify()

    def call(self, function: str, *arguments: Any) -> Future[Any]:
        """Make every rank call one of `jobs`, from any thread. Raises RankError if the driver has ended.

        Calls run in order, one before each step, so that answers progress between them. The result is rank
        0's, or an ArgumentError; RankError if the driver ends first. Cancelled calls are skipped.
        """
        with self._changed:
            self._check_open()
            future: Future[Any] = Future()
            self._calls.append((Job(function, arguments), future))
            self._changed.notify()
        return future

    def _check_open(self) -> None:
        if self.failure or self._next.closing:
            raise RankError("the model is no longer running")

    def unfinished(self) -> int:
        """How many requests have been submitted and have not ended."""
        return len(self._tickets)

    def close(self) -> None:
        """End the thread, on every rank, and wait for it."""
        with self._changed:
            self._next.closing = True
            self._changed.notify()
        if self._thread:
            self._thread.join()

    def follow(self) -> None:
        """Follow rank 0 until it closes; called on the other ranks."""
        self._run(Plan)

    def _drive(self, fail: Callable[[], object]) -> None:
        try:
            self._run(self._take)
        except BaseException as error:
            self.failure = error
            fail()
        finally:
            with self._changed:
                futures = [future for _, future in self._calls if future.set_running_or_notify_cancel()]
                futures += [self._call] if self._call else []
                self._calls.clear()
            for future in futures:
                future.set_exception(RankError("the model is no longer running"))

    def _run(self, take: Callable[[], Plan]) -> None:
        engine, requests = self.llama.engine, dict[int, Request]()
        while not (plan := self._once(take)).closing:
            for number, prompt, params, images, grammar in plan.added:
                constraint = self.llama.grammars.read(grammar).begin() if grammar else None
                requests[number] = engine.add(prompt, params, constraint=constraint, images=images)
            for number in plan.cancelled:
                if number in requests:
                    engine.cancel(requests[number])
            if plan.job:
                self._do(plan.job)
            if engine.has_work():
                engine.step()
            for number, request in list(requests.items()):
                self._deliver(number, request)
                if request.finish_reason:
                    del requests[number]

    def _take(self) -> Plan:
        """What has been submitted since the last step; waits if there is nothing to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._next or self._calls or self.llama.engine.has_work())
            plan, self._next = self._next, Plan(closing=self._next.closing)
            while self._calls and not (plan.job or plan.closing):
                job, future = self._calls.popleft()
                if future.set_running_or_notify_cancel():
                    plan.job, self._call = job, future
        return plan

    def _do(self, job: Job) -> None:
        """Make a call; only rank 0 delivers the result."""
        outcome: Any
        try:
            outcome = self.jobs[job.function](*job.arguments)
        except ArgumentError as error:  # the same on every rank
            outcome = error
        with self._changed:
            future, self._call = self._call, None
        if future and isinstance(outcome, ArgumentError):
            future.set_exception(outcome)
        elif future:
            future.set_result(outcome)

    def _deliver(self, number: int, request: Request) -> None:
        """Deliver a request's events from the last step; on ranks other than 0, nobody receives them."""
        if (ticket := self._tickets.get(number)) and (events := request.events(ticket.told)):
            ticket.told += len(events)
            if events[-1].finish_reason:
                with self._changed:
                    del self._tickets[number]
            ticket.deliver(request, events)
