"""A model larger than memory runs from its mapped file."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny

LIMIT = 500 * 2**20  # PyTorch itself takes about half of it
SHAPE = {"dim": 2048, "n_layers": 10, "n_heads": 16, "n_kv_heads": 4, "multiple_of": 256}
SCRIPT = """
import sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text("0")
from llama import Llama
mmap = sys.argv[3] == "True"
llama = Llama.build(sys.argv[2], dtype="bfloat16", max_seq_len=64, max_batch_size=1, mmap=mmap)
print(llama.generate([[1, 2, 3]], 4, temperature=0)[0])
"""


@contextlib.contextmanager
def limited_memory(limit: int) -> Iterator[Path]:
    """A context with a control group of Linux that has a limit on memory, mapped files included."""
    memory = Path("/sys/fs/cgroup/memory")  # version 1
    name = "memory.limit_in_bytes"
    if not memory.is_dir():
        memory, name = Path("/sys/fs/cgroup"), "memory.max"
    group = memory / f"llama-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"cannot limit memory here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def forget(path: Path) -> None:
    """Drop a file from the system's cache, so that whoever reads it next is charged for it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.soak
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by Linux's control groups")
def test_a_model_larger_than_memory_runs_from_its_file(tmp_path: Path) -> None:
    model = tiny.random_model(**{**tiny.PARAMS, **SHAPE}).bfloat16()
    tiny.save_model(tmp_path / "large", model)
    tiny.write_tokenizer(tmp_path / "large" / "tokenizer.model")
    weights = tmp_path / "large" / "consolidated.00.pth"
    assert weights.stat().st_size > 1.5 * LIMIT

    def run(group: Path, mmap: bool) -> subprocess.CompletedProcess[str]:
        forget(weights)
        command = [sys.executable, "-c", SCRIPT, group, weights.parent, str(mmap)]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    with limited_memory(LIMIT) as group:
        limited = run(group, mmap=True)
        assert limited.returncode == 0, limited.stderr
        assert run(group, mmap=False).returncode == -9  # killed by the system
    with limited_memory(8 * LIMIT) as group:
        assert run(group, mmap=False).stdout == limited.stdout
