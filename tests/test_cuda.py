"""What a GPU computes is what a CPU computes in fp32: run with `pytest -m cuda` where there is one.

The same tests run on a CPU, as far as it goes, so that they are known to work before they meet a GPU.
"""

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llama import backends
from llama.backends import Plan
from llama.engine import Engine
from llama.engine.static import compile_blocks
from llama.loading import load_weights
from llama.model import Transformer
from llama.parallel import Joined
from llama.sampling import SamplingParams
from tests.support.quantized import KEPT, Held, distance, reloaded
from tests.support.tiny import small_model

CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", GPU]
PROMPTS = [[*range(1, 30)], [7], [*range(60, 0, -1)]]
SHAPE = {"dim": 256, "n_heads": 8, "n_kv_heads": 4, "n_layers": 3, "max_seq_len": 256, "max_batch_size": 4}


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    """fp32 is to be fp32, on a GPU too."""
    torch.set_float32_matmul_precision("highest")


def exact_model(seed: int = 0) -> Transformer:
    return small_model(seed, std=0.06, **SHAPE)


def model_on(device: str, exact: Transformer, dtype: torch.dtype, scheme: str | None = None) -> Transformer:
    """The same model as it is loaded on a device by a GPU's plan."""
    with torch.device("meta"):
        model = Transformer(exact.params)
    where = torch.device(device)
    plan = backends.plan(model, where, dtype, scheme) if device == "cuda" else KEPT
    load_weights(model, Held(exact), plan, where, dtype, scheme)
    return model


def answers(engine: Engine, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[tuple[list[int], Tensor]]:
    """Greedy tokens and their logprobs, all prompts at once."""
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=True)
    requests = [engine.add([*prompt], params) for prompt in prompts]
    for _ in engine.run(requests):
        pass
    return [(request.tokens, torch.tensor(request.logprobs)) for request in requests]


def assert_same(found: Sequence[tuple[list[int], Tensor]], exact: Sequence[tuple[list[int], Tensor]]) -> None:
    for (tokens, logprobs), (expected, scores) in zip(found, exact, strict=True):
        assert tokens == expected
        torch.testing.assert_close(logprobs, scores, rtol=0, atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_decoding_is_that_of_the_cpu_in_fp32(device: str, way: str) -> None:
    """Compiled means at fixed shapes too: captured as a graph, and by flex attention, on a GPU."""
    exact = exact_model()
    model = model_on(device, exact, torch.float32)
    if way == "compiled":
        compile_blocks(model)
    engine = Engine(model, static=way == "compiled")
    assert_same(answers(engine), answers(Engine(exact)))
    if engine.static and device == "cuda":
        assert engine.static.flex and engine.static.graphs and engine.static.graphs.graphs
        engine.static.flex = False  # the same without flex attention
        engine.close()
        assert_same(answers(engine), answers(Engine(exact)))


@pytest.mark.parametrize("device", DEVICES)
def test_16_bits_are_close(device: str) -> None:
    exact, tokens = exact_model(), torch.arange(1, 64)[None]
    for dtype in (torch.bfloat16, torch.float16):
        found = model_on(device, exact, dtype)(tokens.to(device), 0)
        assert distance(found.cpu(), exact(tokens, 0)) < (0.04 if dtype == torch.bfloat16 else 0.006)


@pytest.mark.parametrize("scheme", ["int8", "int5", "int4"])
@pytest.mark.parametrize(
    ("device", "way"),
    [
        ("cpu", "eager"),
        pytest.param("cuda", "eager", marks=pytest.mark.cuda),
        pytest.param("cuda", "compiled", marks=pytest.mark.cuda),
    ],
)
def test_quantized_products_are_those_of_their_numbers(device: str, scheme: str, way: str) -> None:
    exact = reloaded(exact_model(), Plan(), scheme)  # dequantized, on the CPU, in fp32
    model = model_on(device, exact_model(), torch.float32, scheme)
    if way == "compiled":
        compile_blocks(model)
    assert_same(answers(Engine(model, static=way == "compiled")), answers(Engine(exact)))


@pytest.mark.cuda
def test_fp8_is_close() -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no fp8")
    exact, tokens = exact_model(), torch.arange(1, 64)[None]
    model = model_on("cuda", exact, torch.bfloat16, "fp8")
    assert all(m.backend for m in model.modules() if isinstance(m, Joined))
    assert distance(model(tokens.cuda(), 0).cpu(), exact(tokens, 0)) < 0.15


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_does_not_depend_on_its_company(device: str, dtype: torch.dtype) -> None:
    engine = Engine(model_on(device, exact_model(), dtype), batch_invariant=True)
    together = answers(engine)
    for prompt, (tokens, logprobs) in zip(PROMPTS, together, strict=True):
        [(alone, scores)] = answers(engine, [prompt])
        assert alone == tokens
        assert torch.equal(scores, logprobs)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_two_models_share_a_device_and_one_outlives_the_other(device: str) -> None:
    engines, expected = [], []
    for seed in (0, 1):
        exact = exact_model(seed)
        expected.append(answers(Engine(exact)))
        model = model_on(device, exact, torch.float32)
        compile_blocks(model)
        engines.append(Engine(model, static=True))
    for engine, answer in zip(engines, expected, strict=True):
        assert_same(answers(engine), answer)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    engines.pop(0).close()
    del engine, model
    gc.collect()
    assert device == "cpu" or torch.cuda.memory_allocated() < before
    assert_same(answers(engines[0]), expected[1])
    engines[0].close()  # its graphs are captured again if they are needed
    assert_same(answers(engines[0]), expected[1])
