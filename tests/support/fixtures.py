"""Tiny random checkpoints, the real demo model, real ranks, and the command line."""

import contextlib
import io
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from llama.checkpoint.convert import convert
from llama.cli import main
from llama.tokenizer import Tokenizer
from llama.vision import VisionTransformer
from tests.support import DEMO, ROOT, forked, tiny, vision

# For tiny products, waking a second thread costs what it gains, and far more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_ckpt(pytestconfig: pytest.Config) -> Path:
    """The demo model's folder: the repository's, or one that is downloaded once and kept."""
    kept = pytestconfig.cache.mkdir("demo")
    with FileLock(kept / "lock"):
        for folder in (ROOT / DEMO, kept / DEMO):
            if folder.is_dir():
                return folder
        command = ["bash", str(ROOT / "download.sh"), DEMO, "--target", str(kept)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable})
        return kept / DEMO


@pytest.fixture(scope="session")
def metas_tokenizer():
    """Meta's own, for Llama 3; its package includes the file."""
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    return MetaTokenizer.get_instance()


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Tokenizer:
    """Of the file that Meta's package includes."""
    import llama_models

    return Tokenizer(Path(llama_models.__file__).parent / "llama3" / "tokenizer.model")


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """A tiny random checkpoint in one shard, with its tokenizer."""
    return tiny.write_checkpoint(tmp_path / "tiny")


@pytest.fixture(scope="session")
def vision_model() -> VisionTransformer:
    """A tiny model that sees; tests leave it as it is, and its checkpoints too."""
    return vision.random_vision()


@pytest.fixture(scope="session")
def vision_native(vision_model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.write_checkpoint(tmp_path_factory.mktemp("vision") / "native", vision_model)


@pytest.fixture(scope="session")
def vision_hf(vision_native: Path) -> Path:
    return convert(vision_native, vision_native.parent / "hf", "hf")


@pytest.fixture(scope="session")
def torchrun():
    """Run a script under real ranks; returns the finished process, its output captured as text."""

    def run(nproc: int, *arguments: object, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(nproc)]
        command += options.pop("flags", ["--standalone"])
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})},
            start_new_session=True,
            **options,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):  # ranks outlive an agent that is killed
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory):
    """Runs a script or `-m` module on ranks, faster than `torchrun`; for what the ranks do, not for how
    they are started and ended. See `forked.run`.
    """

    def run(size: int, *arguments: object, **options) -> subprocess.CompletedProcess:
        return forked.run(size, tmp_path_factory.mktemp("ranks"), *arguments, **options)

    return run


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `llama` with these words in this process; returns its exit code, output, and errors."""

    def run(*words: object, typed: str = "") -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(sys, "argv", ["llama", *map(str, words)])
        try:
            main()
            code: Any = 0
        except SystemExit as leaving:
            code = leaving.code
        printed = capsys.readouterr()
        return (1, printed.out, code) if isinstance(code, str) else (code, printed.out, printed.err)

    return run


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # otherwise torch would keep each seed, with a stack trace, for later
        torch.cuda.manual_seed_all(0)


# The processor's own instructions, and on x86 those of AVX512 without AMX, those of AVX2, and plain vectors.
FLAGS = {
    "-march=cooperlake": {"avx512_bf16", "avx512_vnni", "avx512vl"},
    "-march=x86-64-v3": {"avx2", "fma", "f16c"},
    "": set(),
}
TARGETS = [None, *(pytest.param(target, marks=[pytest.mark.slow]) for target in FLAGS)]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str | None:
    """For which processor the kernels are compiled; see `native.library`."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    if needed := FLAGS.get(request.param):
        flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
        if not needed <= set(flags.split()):
            pytest.skip(f"this processor lacks {', '.join(needed)}")
    return request.param
