"""What a text shows about a model's matrices: which of their inputs are large, so that errors there count."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llama.checkpoint.source import Checkpoint, check_finite
from llama.device import default_device
from llama.errors import ArgumentError
from llama.loading import load, matrices
from llama.model import Row
from llama.parallel import ModelParallel
from llama.quantization import OUTPUT
from llama.vision import make_args, text_params

WINDOW = 512  # tokens that see each other


def read_text(path: str) -> str:
    """A file's text, to calibrate with. Raises FileNotFoundError, or ArgumentError if it has none."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no file {path} to calibrate with: name a text like those of the model's later use"
        )
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError:
        raise ArgumentError(f"{path} is not a text in UTF-8: calibrate with one that is") from None
    if not text.strip():
        raise ArgumentError(f"{path} is empty: calibrate with a text of some ten thousand words")
    return text


@torch.inference_mode()
def mean_squares(checkpoint: Checkpoint, text: str) -> dict[str, Tensor]:
    """The mean squares of each matrix's inputs over a text's tokens, fp32 (in), by the matrix's name.

    An error in a weight reaches the product multiplied by the weight's input. So these are the factors for
    the squared errors of weights, the `importance` of `quantizer.quantize`. Embeddings, and a vision
    model's matrices for images, have none.
    On a CPU, weights are read from their files in every step, so the model needs little memory.
    Raises what loading raises, and CheckpointError if a square is not finite.
    """
    device = default_device()
    args = make_args(text_params(checkpoint.params), WINDOW, 1)
    on_cpu = device.type == "cpu"
    model = load(checkpoint, args, ModelParallel(), device, whole_steps=False, mapped=on_cpu)
    tokens = checkpoint.tokenizer.encode(text, bos=True, eos=False)
    sums: dict[str, Tensor] = {}

    def adder(names: Iterable[str]) -> Callable[[object, tuple[Tensor]], None]:
        """A hook that adds a matrix's input (N, in), by all of its names."""

        def add(_: object, inputs: tuple[Tensor]) -> None:
            total = inputs[0].float().square().sum(0).cpu()
            sums.update({name: sums.get(name, 0) + total for name in names})

        return add

    for module, parts in matrices(model):
        module.register_forward_pre_hook(adder(parts))
    for start in tqdm(range(0, len(tokens), WINDOW), "Calibrating", leave=False, disable=None):
        window = torch.tensor(tokens[start : start + WINDOW], device=device)
        hidden = model.hidden(window, [Row(0, 0, len(window))])
        adder([OUTPUT])(None, (hidden,))  # the output layer's input; its product is not needed
    return {name: check_finite(name, total / len(tokens)) for name, total in sums.items()}
