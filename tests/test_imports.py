"""What code around this package imports, what importing it needs, and how the package is laid out."""

import re
import subprocess
import sys

import pytest

from tests.support import ROOT

READING_PATH = (
    *("model.py", "parallel.py", "sampling.py", "generation.py", "streaming.py"),
    *(f"engine/{name}.py" for name in ("engine", "slots", "request", "runners")),
)


def test_public_imports_of_the_deprecated_repository() -> None:
    from llama import Dialog, Llama, ModelArgs, Tokenizer, Transformer
    from llama.generation import ChatPrediction, CompletionPrediction
    from llama.generation import Llama as Generation
    from llama.model import ModelArgs as Args
    from llama.model import Transformer as Model
    from llama.tokenizer import ChatFormat, Message
    from llama.tokenizer import Dialog as Dialogs
    from llama.tokenizer import Tokenizer as Tokens

    assert (Llama, ModelArgs, Transformer, Tokenizer) == (Generation, Args, Model, Tokens)
    assert Dialog == Dialogs
    assert {"role", "content"} <= Message.__annotations__.keys()
    assert "generation" in ChatPrediction.__annotations__
    assert "generation" in CompletionPrediction.__annotations__
    assert callable(ChatFormat(None).encode_dialog_prompt)  # type: ignore[arg-type]


def test_everything_public_is_there() -> None:
    import llama

    assert all(hasattr(llama, name) for name in llama.__all__)
    assert not hasattr(llama, "nonsense")
    assert (ROOT / "llama" / "py.typed").exists()


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_importing_takes_no_modules_of_unix() -> None:
    """As on Windows, which lacks them. torch comes first: it is not the question."""
    run(
        """
import sys, torch, fire, tqdm, fairscale.nn.model_parallel
for name in ("resource", "termios", "fcntl", "readline", "tty", "pty"):
    sys.modules[name] = None
from importlib import import_module
import llama
[getattr(llama, name) for name in llama.__all__]
from llama.cli import COMMANDS, load
[load(name) for name in COMMANDS]
import llama.checkpoint.convert, llama.checkpoint.remote
"""
    )


@pytest.mark.slow
def test_importing_takes_no_compiler() -> None:
    """It would take longer than a chat's first answer."""
    run("import sys; from llama import Llama; assert 'torch._dynamo' not in sys.modules")


def test_help_needs_no_torch() -> None:
    run("import sys; sys.modules['torch'] = None; sys.argv = ['llama']; from llama.cli import main; main()")


def test_no_file_is_long() -> None:
    """400 lines can be read in one sitting; 2,000 of the reading path in an afternoon."""
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for folder in ("llama", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {path: lines for path, lines in lengths.items() if lines > 400}
    assert sum(lengths.get(f"llama/{name}", 0) for name in READING_PATH) <= 2000


def test_contributing_shows_the_contract() -> None:
    contract = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.S | re.M)
    assert contract is not None
    layers = [layer.replace("llama.", "") for layer in re.findall('"(.+)"', contract[1])]
    assert "\n".join(["```", *layers, "```"]) in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def test_contributing_and_readme_name_files_that_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/troubleshooting.md"):
        page = ROOT / name
        text = page.read_text("utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), (name, link)
    for file in re.findall(r"`((?:\w+/)*\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8")):
        assert (ROOT / "llama" / file).exists() or (ROOT / "llama" / "checkpoint" / file).exists(), file
