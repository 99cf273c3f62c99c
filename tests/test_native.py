"""The compiled step against model.py, and against itself in other company."""

import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama import backends
from llama.backends import native
from llama.backends.native import NativeStep, UnavailableError, pack, pack_quantized
from llama.backends.native.compiler import SOURCES
from llama.device import one_thread
from llama.engine import Engine, runners
from llama.errors import ArgumentError
from llama.model import ModelArgs, Row, Transformer
from llama.parallel import ModelParallel
from llama.quantization import QuantizedMatrix
from llama.sampling import SamplingParams
from tests.support import ROOT
from tests.support.quantized import distance, reloaded
from tests.support.steps import LONG, cached, dtype_of, ids, random_model, run, step_of, steps_of, weight_of

if shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

KINDS = ["fp32", "bf16", "int8", "int5", "int5 symmetric", "int4", "int4 symmetric"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (8, 1)])
def test_fp32_is_that_of_the_model(target: str | None, heads: tuple[int, int], tied: bool) -> None:
    model = random_model(n_heads=heads[0], n_kv_heads=heads[1], use_scaled_rope=True)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    tokens, rows = ids(LONG + 40), [Row(2, 0, LONG), Row(0, 0, 37), Row(3, 0, 3)]
    hidden = model.hidden(tokens[: LONG + 37 + 3], rows)
    logits = model.logits(hidden)
    keys = model.cache.data[:, :, 2, :, :LONG].clone()
    model.cache.data.fill_(torch.nan)  # what nobody wrote is never read
    step = step_of(model, "fp32", target)
    ours = run(model, step, tokens[: LONG + 37 + 3], rows)
    torch.testing.assert_close(ours, hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(step.logits(ours), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached(model, step)[:, :, 2, :, :LONG], keys, atol=1e-4, rtol=1e-4)


def test_bf16_is_as_close_to_fp32_as_the_model_is(target: str | None) -> None:
    model, tokens, rows = random_model(head_dim=32), ids(300), [Row(0, 0, 300)]
    model.bfloat16().float()
    exact = model.logits(model.hidden(tokens, rows))
    model = model.bfloat16()
    model.allocate_cache()
    theirs = (model.logits(model.hidden(tokens, rows)) - exact).abs().mean()
    step = step_of(model, "bf16", target)
    ours = (step.logits(run(model, step, tokens, rows)) - exact).abs().mean()
    assert 0 < ours < 1.1 * theirs


@pytest.mark.parametrize("kind", KINDS[2:])
def test_groups_are_multiplied_by_their_definition(target: str | None, kind: str) -> None:
    # Whole numbers of which 127 is the largest in each group are what activations become.
    model = random_model(vocab_size=1000)  # not a multiple of any tile
    step = step_of(model, kind, target)
    x = torch.randint(-127, 128, (11, 96), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::32] = 127
    exact = (x.double() @ model.output.weight.double().T).float()
    torch.testing.assert_close(step.logits(x), exact, rtol=1e-5, atol=1e-3)


def test_chosen_int8_matrices_take_activations_in_two_parts(target: str | None) -> None:
    """One part alone would be 0.005 away."""
    model, tokens, rows = random_model(vocab_size=1000), ids(70), [Row(0, 0, 70)]
    step = step_of(model, "int8", target)
    hidden = model.hidden(tokens, rows)
    first = model.cache.data[0, :, 0, :, :70].clone()  # keys and values, from exact embeddings
    run(model, step, tokens)
    assert distance(cached(model, step)[0, :, 0, :, :70], first) < 1e-4
    assert distance(step.logits(hidden), model.logits(hidden)) < 1e-4


def test_matrices_of_other_bits_may_read_the_same_activations(target: str | None) -> None:
    model, tokens = random_model(), ids(70)
    step = steps_of(model, "int4", target, others={"wv": "int8"})[0]
    assert distance(run(model, step, tokens), model.hidden(tokens, [Row(0, 0, 70)])) < 0.03


@pytest.mark.parametrize("kind", KINDS[2:])
def test_products_have_the_bits_of_single_rows(target: str | None, kind: str) -> None:
    pick = torch.Generator().manual_seed(0)
    # An odd number of groups, and more than are unpacked at once; several panels of rows.
    weight, x = torch.randn(40, 51 * 32, generator=pick), torch.randn(300, 51 * 32, generator=pick)
    for parts in (1, 2):
        packed = pack_quantized(weight_of(weight, kind), target=target, parts=parts)
        single = torch.cat([packed(row[None]) for row in x])
        for n in (2, 5, 6, 7, 8, 9, 16, 23, 129, 300):
            assert torch.equal(packed(x[:n]), single[:n]), n
        error = distance(packed(x), x @ packed.widen().T)
        assert error < 0.02 and (error < 1e-4) == (packed.parts == 2)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_quantized_models_are_those_of_their_weights(target: str | None, kind: str) -> None:
    model, tokens, rows = random_model(), ids(70), [Row(0, 0, 70)]
    step = step_of(model, kind, target)
    exact = model.hidden(tokens, rows)
    error = (run(model, step, tokens, rows) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.03  # of activations in 8 bits


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("bf16", "int4") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_bits_do_not_depend_on_company_chunks_slots_or_threads(target: str | None, kind: str) -> None:
    # Heads of 32 channels are attended to by AMX, others by vectors.
    model = random_model(dtype_of(kind), max_batch_size=8, head_dim=32 if kind in ("bf16", "int4") else 16)
    steps = steps_of(model, kind, target, (2, 1, 16))
    step = steps[0]
    pick = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=pick))

    requests = [ids(LONG if i == 0 else number(1, 30), seed=i) for i in range(200)]
    expected = [run(model, step, request) for request in requests]
    model.cache.data.fill_(torch.nan)
    waiting, running = list(range(200)), {}  # slot: request and how much of it has been computed
    while waiting or running:
        for slot in range(8):
            if slot not in running and waiting and number(0, 2):
                running[slot] = (waiting.pop(0), 0)
        rows = []
        for slot, (i, done) in running.items():
            left = len(requests[i]) - done
            if number(0, 4):
                rows.append((i, Row(slot, done, min(left, number(1, 4) if i else number(1, 200)))))
        if not rows:
            continue
        tokens = torch.cat([requests[i][row.start : row.stop] for i, row in rows])
        got = run(model, steps[number(0, 3)], tokens, [row for _, row in rows])
        for (i, row), part in zip(rows, got.split([row.length for _, row in rows]), strict=True):
            assert torch.equal(part, expected[i][row.start : row.stop])
            running[row.slot] = (i, row.stop)
            if row.stop == len(requests[i]):
                del running[row.slot]
    together = step.logits(torch.cat(expected[:20]))
    assert torch.equal(together, torch.cat([step.logits(part[None]) for part in torch.cat(expected[:20])]))


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("lengths", [(1500,), (1500, 1300, 700, 1499)])
def test_long_contexts_have_the_same_bits_in_short_rows(
    target: str | None, kind: str, lengths: Sequence[int]
) -> None:
    """A few tokens attend to several chunks at once, split over positions if there is one sequence."""
    model = random_model(dtype_of(kind), head_dim=32, max_seq_len=1500)
    step = steps_of(model, kind, target, threads=(1,))[0]
    requests = [ids(length, seed=length) for length in lengths]
    whole = [run(model, step, tokens, [Row(i, 0, len(tokens))]) for i, tokens in enumerate(requests)]
    for few in (1, 3, 11):
        rows = [Row(i, length - few, few) for i, length in enumerate(lengths)]
        got = run(model, step, torch.cat([tokens[-few:] for tokens in requests]), rows)
        assert torch.equal(got, torch.cat([hidden[-few:] for hidden in whole]))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_copied_prefix_is_continued_with_the_same_bits(target: str | None, kind: str) -> None:
    model, tokens = random_model(dtype_of(kind)), ids(40)
    step = step_of(model, kind, target)
    whole = run(model, step, tokens)
    model.cache.copy(0, 1, 21)
    assert torch.equal(run(model, step, tokens[21:], [Row(1, 21, 19)]), whole[21:])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_weights_in_place_give_the_same_bits(target: str | None, kind: str) -> None:
    model, tokens = random_model(dtype_of(kind)), ids(50)
    tiled, in_place = (step_of(model, kind, target, in_place=place) for place in (False, True))
    assert torch.equal(run(model, tiled, tokens), run(model, in_place, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_shows_in_the_logits(target: str | None, kind: str) -> None:
    damages = ["tok_embeddings", "layers.0.attention.wq", "layers.1.attention.wv", "layers.0.feed_forward.w1"]
    for name in [*damages, "layers.1.attention_norm"]:
        model = random_model(dtype_of(kind))
        model.get_parameter(f"{name}.weight").view(-1)[:96] = torch.nan
        step = step_of(model, kind, target)
        assert not step.logits(run(model, step, torch.tensor([0]))).isfinite().any()


def test_what_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    for shape, found in (({"head_dim": 10, "n_heads": 16}, "head_dim=10"), ({"dim": 80}, "dim=80")):
        with pytest.raises(UnavailableError, match=found):
            native.check(random_model(**shape), cpu, bf16)
    model = random_model()
    native.check(model, cpu, bf16)
    monkeypatch.setattr(backends, "default_dtype", lambda device: torch.float32)  # no bf16 instructions
    assert backends.fastest_dtype(model, cpu) == bf16
    assert backends.fastest_dtype(model, cpu, whole_steps=False) == torch.float32
    assert backends.fastest_dtype(random_model(dim=80), cpu) == torch.float32
    with pytest.raises(UnavailableError, match="float16"):
        native.check(model, cpu, torch.float16)
    with pytest.raises(UnavailableError, match="for CPUs"):
        native.check(model, torch.device("cuda"), bf16)
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=64)
    with pytest.raises(UnavailableError, match="one rank"):
        native.check(Transformer(args, ModelParallel(0, 2)), cpu, bf16)
    step = step_of(model, "fp32")
    with pytest.raises(IndexError, match="0 to 519"):
        run(model, step, torch.tensor([520]), [Row(0, 0, 1)])
    with pytest.raises(IndexError):
        run(model, step, torch.tensor([-1]), [Row(0, 0, 1)])
    with pytest.raises(ValueError, match="3 tokens"):
        run(model, step, torch.tensor([1, 2]), [Row(0, 0, 3)])


def loaded(model: Transformer, scheme: str | None = None) -> Transformer:
    return reloaded(model, backends.plan(model, model.device, model.dtype), scheme)


def test_a_loaded_model_gives_its_steps_away() -> None:
    model = random_model()
    tokens = ids(20)[None]
    expected = model(tokens, 0)
    model = loaded(model)
    assert isinstance(model.step_backend, NativeStep)
    torch.testing.assert_close(model(tokens, 0), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ArgumentError, match="do not fit the cache"):
        model(tokens, LONG)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_requests_get_the_same_bits_in_any_company(batch_invariant: bool) -> None:
    model = loaded(random_model(torch.bfloat16))
    engine = Engine(model, prefill_chunk=7, batch_invariant=batch_invariant)

    def generate(prompts: Sequence[Tensor], logprobs: bool = True) -> list[tuple[list[int], list[float]]]:
        drawn = SamplingParams(max_tokens=8, logprobs=logprobs, temperature=0.9)
        params = [replace(drawn, seed=i) for i in range(len(prompts))]
        requests = [engine.add(p.tolist(), q) for p, q in zip(prompts, params, strict=True)]
        for _ in engine.run(requests):
            pass
        return [(request.tokens, request.logprobs) for request in requests]

    prompts = [ids(5 + 3 * i, seed=i) for i in range(9)]
    together = generate(prompts)
    assert generate(prompts[:1]) == together[:1]
    assert generate(prompts[:2])[1] == together[1]
    in_one_call = generate(prompts, logprobs=False)  # of the compiled step
    assert [tokens for tokens, _ in in_one_call] == [tokens for tokens, _ in together]


def write_for_driver(path: Path, model: Transformer, kinds: dict[str, str], tokens: Tensor) -> None:
    """What native_driver.cpp reads; kinds: of matrices, by their last name; of others fp32."""
    args = model.params
    sizes = (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.head_dim, args.hidden_dim)
    numbers = [*sizes, args.vocab_size, args.max_batch_size, args.max_seq_len, 0]
    parts = [torch.tensor(numbers, dtype=torch.int32), torch.tensor([args.norm_eps])]

    def matrix(name: str) -> None:
        weight = model.get_parameter(f"{name}.weight")
        kind = kinds.get(name.rpartition(".")[2], "fp32")
        code, arrays = {"fp32": 0, "bf16": 1}.get(kind), [weight.to(dtype_of(kind))]
        if code is None:
            quantized = weight_of(weight, kind)
            code, arrays = {8: 2, 5: 3, 4: 4}[quantized.bits], quantized.tensors
            weight.copy_(quantized.dequantize())
        else:
            weight.copy_(arrays[0])
        parts.append(torch.tensor([code, *weight.shape, len(arrays) == 3], dtype=torch.int32))
        parts.extend(arrays)

    for i in range(args.n_layers):
        for name in ("wq", "wk", "wv", "wo"):
            matrix(f"layers.{i}.attention.{name}")
        for name in ("w1", "w2", "w3"):
            matrix(f"layers.{i}.feed_forward.{name}")
        parts += [model.get_parameter(f"layers.{i}.{name}_norm.weight") for name in ("attention", "ffn")]
    matrix("tok_embeddings")
    matrix("output")
    parts += [
        model.norm.weight,
        model.rotations,
        torch.tensor([len(tokens)], dtype=torch.int32),
        tokens.int(),
    ]
    with path.open("wb") as file:
        for part in parts:
            file.write(part.detach().contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ("-march=armv8.2-a+dotprod", {"wq": "int8", "wk": "int8", "wv": "int8", "output": "int4 symmetric"}),
        ("-march=armv8-a", {"wk": "bf16", "output": "int5 symmetric"}),
    ],
)
def test_on_emulated_arm(tmp_path: Path, options: str, kinds: dict[str, str]) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    model, tokens = random_model(), ids(290)
    kinds = {**kinds, "w1": "int8", "w3": "int8", "w2": "int4", "wo": "int5"}
    write_for_driver(tmp_path / "model", model, kinds, tokens)
    driver = tmp_path / "driver"
    flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-static", "-pthread", f"-I{SOURCES[0].parent}"]
    source = ROOT / "tests" / "support" / "native_driver.cpp"
    subprocess.run([compiler, options, *flags, source, "-o", driver], check=True)
    subprocess.run([emulator, driver, tmp_path / "model", tmp_path / "out"], check=True, timeout=120)
    ours = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.float32).view(290, -1)
    exact = model.logits(model.hidden(tokens, [Row(0, 0, 290)]))
    assert (ours - exact).square().mean().sqrt() / exact.square().mean().sqrt() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_single_layers_can_be_run_too(target: str | None, kind: str) -> None:
    model, x = random_model(dtype_of(kind), vocab_size=1001), torch.randn(3, 5, 96)
    weight = weight_of(model.output.weight, kind)
    quantized = isinstance(weight, QuantizedMatrix)
    packed = pack_quantized(weight, target=target) if quantized else pack(weight, target=target)
    exact = (weight.dequantize() if quantized else weight).float()
    assert distance(packed(x), x @ exact.T) < (0.02 if quantized else 0.005)
    tokens = torch.tensor([[0, 17], [999, 1000]])
    torch.testing.assert_close(packed.embed(tokens), exact[tokens], rtol=1e-6, atol=1e-6)
    with pytest.raises(IndexError):
        packed.embed(torch.tensor([1001]))
    if quantized:
        torch.testing.assert_close(packed.widen(), exact, rtol=1e-6, atol=1e-6)


def test_an_edited_norm_is_noticed() -> None:
    """Other weights are gone once they are packed: only these can be edited, and are copied to fp32."""
    model = random_model(torch.bfloat16)
    step, tokens, rows = step_of(model, "bf16"), torch.tensor([1, 2, 3]), [Row(0, 0, 3)]
    before = step.hidden(tokens, rows, model.cache.data, model.rotations)
    model.layers[1].ffn_norm.weight.mul_(1.5)
    edited = step.hidden(tokens, rows, model.cache.data, model.rotations)
    assert not edited.equal(before)
    assert edited.equal(step_of(model, "bf16").hidden(tokens, rows, model.cache.data, model.rotations))


def test_an_edited_norm_is_noticed_when_a_token_is_drawn() -> None:
    """Even if the model was built in inference mode, whose tensors cannot be written outside of it."""
    model = random_model()
    with torch.inference_mode():
        step = step_of(model, "fp32")

    def following(step: NativeStep) -> list[int]:
        where = [(SamplingParams(temperature=0), 0)], model.cache.data, model.rotations
        return step.next_tokens([1, 2, 3], [Row(0, 0, 3)], *where)

    before = following(step)
    model.norm.weight.neg_()  # the least likely token is now the most likely
    assert following(step) == following(step_of(model, "fp32")) != before


def test_pytorch_uses_one_thread_beside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would spin on the cores that the step needs. Afterwards it has those it had."""
    model, seen = loaded(random_model(torch.bfloat16)), []
    choose = runners.choose_next
    threads = torch.get_num_threads
    monkeypatch.setattr(runners, "choose_next", lambda *args: seen.append(threads()) or choose(*args))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine = Engine(model)
        engine.add([1, 2, 3], SamplingParams(max_tokens=1, logprobs=True))
        engine.step()
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_a_thread_that_first_uses_pytorch_beside_a_step_does_not_keep_one_thread() -> None:
    before, seen = torch.get_num_threads(), []

    def newcomer() -> None:
        with one_thread:
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        with one_thread:
            thread = threading.Thread(target=newcomer)
            thread.start()
            thread.join(60)
        assert (seen, torch.get_num_threads()) == ([1, 3], 3)
    finally:
        torch.set_num_threads(before)
