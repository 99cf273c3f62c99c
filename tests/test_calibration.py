"""Calibration: the right inputs are measured, and errors land where they count least."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama import Llama
from llama.calibration import WINDOW, mean_squares
from llama.checkpoint import open_checkpoint
from llama.checkpoint.convert import convert
from llama.errors import ArgumentError
from llama.model import Row
from tests.support import tiny
from tests.support.quantized import build

TEXT = "the llama and the other llama in the andes " * 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with some inputs much larger than others."""
    folder = tiny.write_checkpoint(tmp_path / "source", multiple_of=32)
    weights = torch.load(folder / "consolidated.00.pth")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "norm" in name:
            weight.copy_(torch.randn(len(weight), generator=generator).exp())
    torch.save(weights, folder / "consolidated.00.pth")
    return folder


def test_the_inputs_of_every_matrix_are_measured(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    found = mean_squares(checkpoint, TEXT)
    matrices = {name: shape for name, shape in checkpoint.weights.shapes.items() if len(shape) == 2}
    del matrices["tok_embeddings.weight"]
    assert {name: len(squares) for name, squares in found.items()} == {n: s[1] for n, s in matrices.items()}
    llama = Llama.build(source, max_seq_len=WINDOW, max_batch_size=1, device="cpu", whole_steps=False)
    model, tokens = llama.model, llama.tokenizer.encode(TEXT, bos=True, eos=False)
    assert len(tokens) > WINDOW
    x = model.layers[0].attention_norm(model.tok_embeddings(torch.tensor(tokens)))
    torch.testing.assert_close(found["layers.0.attention.wk.weight"], x.float().square().mean(0))
    parts = [torch.tensor(tokens[i : i + WINDOW]) for i in range(0, len(tokens), WINDOW)]
    hidden = torch.cat([model.hidden(part, [Row(0, 0, len(part))]) for part in parts])
    torch.testing.assert_close(found["output.weight"], hidden.float().square().mean(0))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int5", "int4"])
@pytest.mark.parametrize("to", ["native", "hf"])
def test_errors_land_where_they_count_least(
    scheme: str, to: str, source: Path, tmp_path: Path, command_line
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT, "utf-8")
    squares = mean_squares(open_checkpoint(source), TEXT)
    exact = open_checkpoint(source).weights
    start = source if to == "native" else convert(source, tmp_path / "hf", "hf")
    folders = tmp_path / "plain", tmp_path / "calibrated"
    convert(start, folders[0], quantize=scheme)
    code, _, error = command_line("convert", start, folders[1], "--quantize", scheme, "--calibrate", text)
    assert code == 0, error
    plain, calibrated = (open_checkpoint(folder).weights for folder in folders)

    def error_of(found: Tensor, name: str) -> float:
        return ((found - exact.read(name).float()).square() * squares[name]).sum().item()

    ratios = {
        name: error_of(calibrated.read(name), name) / error_of(plain.read(name), name) for name in squares
    }
    assert max(ratios.values()) < 0.97
    assert sum(ratios.values()) / len(ratios) < 0.8
    build(folders[1])  # an ordinary folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--calibrate {text}", "--calibrate needs --quantize with int8, int5 or int4"),
        ("--quantize int4 --calibrate {missing}", "no file {missing} to calibrate with"),
        ("--quantize int4 --calibrate {empty}", "{empty} is empty: calibrate with a text of"),
        ("--quantize int4 --calibrate {binary}", "{binary} is not a text in UTF-8"),
    ],
)
def test_a_mistake_leaves_nothing(
    options: str, message: str, source: Path, tmp_path: Path, command_line
) -> None:
    files = {name: tmp_path / name for name in ("text", "missing", "empty", "binary")}
    for name, content in {"text": b"hello", "empty": b" \n", "binary": b"\xff\xfe"}.items():
        files[name].write_bytes(content)
    code, _, error = command_line("convert", source, tmp_path / "new", *options.format(**files).split())
    assert (code, error.startswith(f"error: {message.format(**files)}")) == (1, True), error
    assert not (tmp_path / "new").exists()


def test_too_many_files_are_refused_before_the_text_is_read(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="1000 shards are more than the model's"):
        convert(source, tmp_path / "new", quantize="int4", shards=1000, calibrate=pytest.fail)
