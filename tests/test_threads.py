"""Any number of threads call one engine, and each gets what it would get alone."""

import contextlib
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from llama.engine import Engine, Request
from llama.errors import LlamaError
from llama.sampling import SamplingParams
from tests.support.tiny import small_model


def finish(engine: Engine, request: Request) -> list[int]:
    return [event.token for event in engine.run([request]) if event.token is not None]


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(0)` … `work(count - 1)`, each in a thread; raise what one of them raised."""
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def expected(prompt: list[int], params: SamplingParams) -> list[int]:
    engine = Engine(small_model(max_batch_size=1))
    return finish(engine, engine.add(prompt, params))


@pytest.mark.parametrize(
    "static", [pytest.param(False, marks=pytest.mark.slow), True], ids=["ragged", "static"]
)
def test_threads_share_steps_and_get_what_they_would_get_alone(static: bool) -> None:
    model = small_model(max_batch_size=4)
    engine = Engine(model, static=static)
    seen: dict[int, list[int]] = {}
    start = threading.Barrier(6)

    def work(i: int) -> None:
        start.wait()
        seen[i] = finish(engine, engine.add([i + 1] * (i + 2), params(i)))

    def params(i: int) -> SamplingParams:
        return SamplingParams(temperature=0.9, seed=i, max_tokens=30)

    in_threads(6, work)
    assert seen == {i: expected([i + 1] * (i + 2), params(i)) for i in range(6)}
    assert engine.steps < 6 * 30  # each step was for several
    assert not engine.has_work()


def test_a_step_of_one_thread_does_not_hold_up_the_bookkeeping_of_others() -> None:
    model = small_model(max_batch_size=2)
    engine = Engine(model)
    entered, go_on = threading.Event(), threading.Event()
    hidden = model.hidden

    def slow(*args: object) -> torch.Tensor:
        entered.set()
        assert go_on.wait(60)
        return hidden(*args)

    model.hidden = slow
    first = engine.add([1, 2], SamplingParams(max_tokens=3))
    thread = threading.Thread(target=finish, args=(engine, first), daemon=True)
    thread.start()
    assert entered.wait(60)
    second = engine.add([3, 4], SamplingParams(max_tokens=3))
    engine.cancel(first)
    assert first.finish_reason == "cancelled"
    go_on.set()
    assert len(finish(engine, second)) == 3
    thread.join(60)
    assert first.tokens == []  # what came after the cancellation is left out


def test_an_error_is_told_to_the_thread_that_was_at_the_step_and_no_other() -> None:
    model = small_model(max_batch_size=4)
    engine = Engine(model)
    hidden, calls = model.hidden, iter(range(10_000))

    def fails_now_and_then(*args: object) -> torch.Tensor:
        if next(calls) in (3, 7):
            raise MemoryError("for once")
        return hidden(*args)

    model.hidden = fails_now_and_then
    ends: dict[int, object] = {}

    def work(i: int) -> None:
        params = SamplingParams(temperature=0.8, seed=i, max_tokens=15)
        request = engine.add([i + 1, 2], params)
        try:
            ends[i] = finish(engine, request) == expected(request.prompt, params)
        except MemoryError:
            ends[i] = request.finish_reason

    in_threads(4, work)
    assert sorted(map(str, ends.values())) == ["True", "True", "cancelled", "cancelled"]


def test_no_cancellation_comes_between_a_look_at_the_slots_and_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the slot would go to a request that knows nothing of the step that is pending."""
    engine = Engine(small_model(max_batch_size=2), static=True)
    params = SamplingParams(temperature=0, max_tokens=10)
    first, second, third = (engine.add([n, n + 1], params) for n in (1, 3, 5))
    look = engine._may_run_ahead  # noqa: SLF001
    cancelling = threading.Thread(target=engine.cancel, args=(first,))

    def then_cancelled() -> bool:
        if (ahead := look()) and cancelling.ident is None:
            cancelling.start()
            cancelling.join(0.2)  # it waits for the plan
        return ahead

    monkeypatch.setattr(engine, "_may_run_ahead", then_cancelled)
    finish(engine, second)
    assert first.finish_reason == "cancelled"
    assert finish(engine, third) == expected([5, 6], params)
    assert second.tokens == expected([3, 4], params)


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True], ids=["ragged", "static"])
def test_eight_threads_with_cancels_and_exceptions(static: bool) -> None:
    """Each thread runs several requests at a time; some it cancels, some it leaves by an exception."""
    model = small_model(std=0.5, max_batch_size=5)
    engine = Engine(model, prefill_chunk=7, static=static)
    single = Engine(small_model(std=0.5, max_batch_size=1))
    hidden, failing = model.hidden, random.Random(0)
    ended: list[Request] = []
    outcomes: Counter[str] = Counter()

    def sometimes_fails(*args: object) -> torch.Tensor:
        if failing.random() < 0.005:
            raise MemoryError("for once")
        return hidden(*args)

    model.hidden = sometimes_fails

    def work(i: int) -> None:
        generator = random.Random(i)
        for _ in range(12):
            requests = []
            for _ in range(generator.randint(1, 3)):
                beginning = [generator.randrange(14, 17)] * generator.choice((0, 9))
                prompt = [*beginning, *(generator.randrange(64) for _ in range(generator.randint(1, 20)))]
                temperature, penalty = generator.choice((0, 0.7)), generator.choice((0, 0, 0.5))
                params = SamplingParams(
                    temperature=temperature,
                    top_k=3,
                    presence_penalty=penalty,
                    seed=generator.randrange(99),
                    max_tokens=generator.randint(1, 20),
                )
                requests.append(engine.add(prompt, params))
            leave = generator.randint(1, 60)
            with contextlib.suppress(MemoryError, KeyError):
                for n, _ in enumerate(engine.run(requests)):
                    if n == leave:
                        raise KeyError("in the consumer")
                    if n == 5 and generator.random() < 0.3:
                        engine.cancel(requests[0])
            ended.extend(requests)

    in_threads(8, work)
    assert not engine.has_work()
    for request in ended:
        tokens = finish(single, single.add(request.prompt, request.params))
        assert request.finish_reason
        outcomes[request.finish_reason] += 1
        if request.finish_reason == "cancelled":
            tokens = tokens[: len(request.tokens)]
        assert request.tokens == tokens
    assert outcomes["length"] > 50
    assert outcomes["cancelled"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True], ids=["ragged", "static"])
def test_keyboard_interrupts_anywhere_break_nothing(static: bool) -> None:
    """A step that is interrupted is made again, and no request shows it."""
    engine = Engine(small_model(max_batch_size=3), static=static)
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=40, logprobs=True) for i in range(12)]
    requests: list[Request] = []
    generator, armed, interrupted = random.Random(5), False, 0

    def interrupt(*_: object) -> None:
        nonlocal armed
        signal.setitimer(signal.ITIMER_REAL, generator.uniform(0.0005, 0.02))
        if armed:
            armed = False
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        while engine.has_work() or interrupted <= 10:  # the faster the machine, the more requests it takes
            if not engine.has_work():
                requests += [engine.add([i + 1] * 5, p) for i, p in enumerate(params)]
            try:
                armed = True
                engine.step()
                armed = False
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    for request in requests:
        assert request.tokens == expected(request.prompt, request.params)
        assert len(request.logprobs) == len(request.tokens)


def test_listeners_hear_of_every_change_and_can_read_it() -> None:
    engine = Engine(small_model())
    told = []

    def listener() -> None:
        told.extend(request.events(len(told)))

    request = engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=5), listener=listener)
    while engine.has_work():
        engine.step()
    assert [event.token for event in told] == [*request.tokens, None]
    assert told[-1].finish_reason == "length"
    cancelled = engine.add([1], SamplingParams(), listener=lambda: told.append(cancelled.finish_reason))
    engine.cancel(cancelled)
    assert told[-1] == "cancelled"


def test_a_forked_child_is_refused_in_one_sentence() -> None:
    engine = Engine(small_model())
    finish(engine, engine.add([1, 2], SamplingParams(max_tokens=2)))
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            engine.add([1, 2], SamplingParams(max_tokens=2))
        except LlamaError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert b"was forked after the model had generated" in os.read(read, 1000)
    os.close(read)
    assert finish(engine, engine.add([1, 2], SamplingParams(max_tokens=2)))
