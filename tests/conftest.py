"""Which tests run, and where; the fixtures that they share are in `tests/support/fixtures.py`."""

import gc
import os
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Fixtures import torch, so only processes that run tests have them: workers wait for the one before."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker has one core
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", 0):
        config.pluginmanager.import_plugin("tests.support.fixtures")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker per core; for a single file or test, starting them would take longer than it saves."""
    return 0 if any(".py" in argument for argument in config.args) else len(os.sched_getaffinity(0))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """What imports leave in memory stays there: no collection of garbage need look at it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip soaks unless `-m` names them, and tests that need a GPU if there is none."""
    soaks = [item for item in items if item.get_closest_marker("soak")]
    if soaks and "soak" not in config.option.markexpr:
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if item not in soaks]
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
