"""Loading: what is mapped, what is copied, how much memory it takes, and every way a folder can be wrong."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama import Llama, ModelArgs, Transformer
from llama.backends import Plan
from llama.checkpoint.convert import convert
from llama.checkpoint.native import NativeShards, find_shards
from llama.checkpoint.params import read_params
from llama.checkpoint.source import read_shard
from llama.errors import CheckpointError
from llama.loading import load_weights
from llama.parallel import ModelParallel
from tests.support import tiny


def load(
    folder: Path, dtype: torch.dtype = torch.float32, parallel: ModelParallel | None = None
) -> Transformer:
    with torch.device("meta"):
        model = Transformer(ModelArgs(**read_params(folder)), parallel)
    source = NativeShards(find_shards(folder), model.params)
    load_weights(model, source, Plan(), torch.device("cpu"), dtype)
    return model


@pytest.mark.parametrize("cut", [tiny.CUT, {**tiny.CUT, "tok_embeddings": 1}], ids=["Llama 3", "Llama 2"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_shards_gives_the_same_weights(tmp_path: Path, count: int, cut: dict[str, int]) -> None:
    expected = tiny.random_model(n_kv_heads=8).state_dict()
    model = load(tiny.write_checkpoint(tmp_path / "ckpt", count, cut=cut, n_kv_heads=8))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_weights_are_cast_to_the_dtype_asked_for(ckpt: Path) -> None:
    model = load(ckpt, torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_tied_embeddings_are_shared(tmp_path: Path) -> None:
    model = load(tiny.write_checkpoint(tmp_path / "ckpt", 2, tied=True))
    assert model.output.weight is model.tok_embeddings.weight


def test_the_rotary_table_of_older_files_is_ignored(ckpt: Path) -> None:
    edit(ckpt, lambda tensors: tensors.update({"rope.freqs": torch.zeros(4)}))
    load(ckpt)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux where an address is mapped from")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_as_many_shards_as_ranks_copies_nothing(tmp_path: Path, count: int) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ckpt", count)
    for rank in range(count):
        model = load(folder, parallel=ModelParallel(rank, count))
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        spans = [(*(int(end, 16) for end in fields[0].split("-")), fields[-1]) for fields in maps]
        for name, weight in model.named_parameters():
            [where] = [path for start, stop, path in spans if start <= weight.data_ptr() < stop]
            # Norms lie in every file, and are taken from the first.
            assert where.endswith(f"consolidated.{0 if 'norm' in name else rank:02d}.pth"), name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for a process's memory")
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_memory_beside_the_model_stays_below_one_shard(tmp_path: Path, count: int) -> None:
    """Anonymous memory, polled by a thread: mapped files are the system's to drop."""
    folder = tiny.write_checkpoint(
        tmp_path / "ckpt", count, dim=512, n_layers=8, multiple_of=512, vocab_size=8192
    )
    script = """
import sys, threading, time, torch
from pathlib import Path
from tests.test_checkpoint import load

def used():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

load(Path(sys.argv[2]))  # what the first call of anything allocates for good
before = peak = used()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, used())

thread = threading.Thread(target=watch)
thread.start()
model = load(Path(sys.argv[1]))
done.set()
thread.join()
print(peak - before, sum(w.nbytes for w in model.parameters()))
"""
    small = tiny.write_checkpoint(tmp_path / "small", count)
    command = [sys.executable, "-c", script, str(folder), str(small)]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    peak, size = map(int, out.stdout.split())
    assert size > 100e6
    assert peak < (0.05 * size if count == 1 else size + size / count)


def edit(folder: Path, change: Callable[[dict], object], number: int = 0) -> None:
    path = folder / f"consolidated.{number:02d}.pth"
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)


def params(folder: Path, **changes: object) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    os.truncate(path, path.stat().st_size // 2)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/llama-was-here",)


WRONG: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "shard missing": (
        lambda d: (d / "consolidated.00.pth").unlink(),
        FileNotFoundError,
        r"1 shards up to consolidated\.01\.pth, but consolidated\.00\.pth is missing",
    ),
    "no shards": (
        lambda d: [path.unlink() for path in d.glob("*.pth")],
        FileNotFoundError,
        r"no consolidated\.\*\.pth",
    ),
    "last shard missing": (
        lambda d: (d / "consolidated.01.pth").unlink(),
        CheckpointError,
        r"but params.json implies .*; is a shard missing\? This looks like one of 2",
    ),
    "truncated": (
        truncate,
        CheckpointError,
        r"consolidated\.01\.pth cannot be read and may be truncated \([\d,]+ bytes\)",
    ),
    "empty file": (
        lambda d: os.truncate(d / "consolidated.00.pth", 0),
        CheckpointError,
        r"00\.pth cannot be read and may be truncated \(0 bytes\)",
    ),
    "web page": (
        lambda d: (d / "consolidated.00.pth").write_text("<html>Sign in</html>"),
        CheckpointError,
        r"consolidated\.00\.pth",
    ),
    "foreign pickle": (
        lambda d: torch.save({"x": Evil()}, d / "consolidated.00.pth"),
        CheckpointError,
        r"00\.pth contains more than tensors, so it was not loaded",
    ),
    "old pickle": (
        lambda d: (d / "consolidated.00.pth").write_bytes(pickle.dumps(Evil())),
        CheckpointError,
        r"consolidated\.00\.pth",
    ),
    "no table": (
        lambda d: torch.save(torch.zeros(3), d / "consolidated.00.pth"),
        CheckpointError,
        r"00\.pth does not map names to tensors",
    ),
    "tensor missing": (
        lambda d: edit(d, lambda t: t.pop("layers.1.attention.wo.weight"), 1),
        CheckpointError,
        r"01\.pth lacks layers\.1\.attention\.wo\.weight",
    ),
    "tensor too many": (
        lambda d: edit(d, lambda t: t.update({"layers.9.attention.wq.bias": torch.zeros(2)}), 1),
        CheckpointError,
        r"01\.pth: unexpected layers\.9\.attention\.wq\.bias: not part of the model that params\.json",
    ),
    "tensor misshaped": (
        lambda d: edit(d, lambda t: t.update({"norm.weight": torch.zeros(65)})),
        CheckpointError,
        r"00\.pth: norm\.weight has shape \(65,\), but params\.json implies \(64,\)",
    ),
    "tensor of integers": (
        lambda d: edit(d, lambda t: t.update({"norm.weight": torch.zeros(64, dtype=torch.int8)})),
        CheckpointError,
        r"norm\.weight is torch\.int8",
    ),
    "no params": (lambda d: (d / "params.json").unlink(), FileNotFoundError, r"no params\.json in"),
    "broken params": (
        lambda d: (d / "params.json").write_text('{"dim": 64,'),
        CheckpointError,
        r"params\.json is not JSON",
    ),
    "params of nothing": (
        lambda d: (d / "params.json").write_text("[]"),
        CheckpointError,
        r"params\.json is not a JSON object",
    ),
    "unknown params": (
        lambda d: params(d, n_experts=8),
        CheckpointError,
        r"params\.json has 'n_experts', which this model does not implement",
    ),
    "contradicting params": (lambda d: params(d, n_heads=7), ValueError, r"n_heads=7"),
    "wrong vocabulary": (
        lambda d: params(d, vocab_size=100),
        CheckpointError,
        r"the tokenizer has 520 tokens, but .*params\.json says vocab_size=100",
    ),
    "no tokenizer": (
        lambda d: (d / "tokenizer.model").unlink(),
        FileNotFoundError,
        r"no tokenizer at .*tokenizer\.model",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_every_fault_of_a_folder_is_one_clear_sentence(tmp_path: Path, fault: str) -> None:
    damage, kind, said = WRONG[fault]
    folder = tiny.write_checkpoint(tmp_path / "ckpt", 2)
    damage(folder)
    with pytest.raises(kind, match=said) as caught:
        Llama.build(folder, max_seq_len=16, max_batch_size=1)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/llama-was-here").exists()


QUANTIZED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    **{name: WRONG[name] for name in ("truncated", "foreign pickle", "no table", "no params")},
    "file missing": (
        lambda d: (d / "consolidated.01.pth").unlink(),
        FileNotFoundError,
        r"2 shards up to consolidated\.02\.pth, but consolidated\.01\.pth is missing",
    ),
    "last file missing": (
        lambda d: (d / "consolidated.02.pth").unlink(),
        CheckpointError,
        r"lacks .* other tensors of a quantized model; is a file missing",
    ),
    "scales missing": (
        lambda d: edit(d, lambda t: t.pop("layers.0.attention.wo.scales")),
        CheckpointError,
        r"lacks layers\.0\.attention\.wo\.scales of a quantized model",
    ),
    "minima missing": (
        lambda d: edit(d, lambda t: t.pop("layers.0.attention.wo.mins")),
        CheckpointError,
        r"lacks layers\.0\.attention\.wo\.mins of a quantized model",
    ),
    "scales of another shape": (
        lambda d: edit(d, lambda t: t.update({"layers.0.attention.wo.scales": torch.ones(64).half()})),
        CheckpointError,
        r"layers\.0\.attention\.wo\.scales is torch\.float16 of shape \(64,\), but .* implies .* \(64, 2\)",
    ),
    "values of another shape": (
        lambda d: edit(d, lambda t: t.update({"layers.0.attention.wo.weight": torch.ones(3).byte()})),
        CheckpointError,
        r"layers\.0\.attention\.wo\.weight is torch\.uint8 of shape \(3,\), but .* \(64, 2, 16\)",
    ),
    "plain weight": (
        lambda d: edit(d, lambda t: t.update({"layers.0.attention.wo.weight": torch.ones(64, 64)})),
        CheckpointError,
        r"unexpected layers\.0\.attention\.wo\.\w+ and 1 other tensors: not part of the model",
    ),
    "embeddings of other integers": (
        lambda d: edit(
            d, lambda t: t.update({"tok_embeddings.weight": torch.zeros(520, 64, dtype=torch.int32)})
        ),
        CheckpointError,
        r"lacks tok_embeddings\.mins of a quantized model",
    ),
    "twice": (
        lambda d: edit(d, lambda t: t.update({"norm.weight": torch.zeros(64)})),
        CheckpointError,
        r"02\.pth and consolidated\.00\.pth both contain norm\.weight",
    ),
    "another scheme": (
        lambda d: params(d, quantization={"scheme": "int3", "layout": 2}),
        CheckpointError,
        r"params\.json has quantization=.*int3.*, written by another version of this package: run",
    ),
    "an older layout": (
        lambda d: params(d, quantization="int4"),
        CheckpointError,
        r"quantization='int4', .*run `python -m llama convert --quantize` again on the folder",
    ),
    "another model": (
        lambda d: params(d, n_layers=4),
        CheckpointError,
        r"lacks layers\.3\.attention\.wq\.weight and \d+ other tensors",
    ),
}


@pytest.mark.parametrize("fault", QUANTIZED)
def test_every_fault_of_a_quantized_folder_is_one_clear_sentence(tmp_path: Path, fault: str) -> None:
    damage, kind, said = QUANTIZED[fault]
    folder = convert(tiny.write_checkpoint(tmp_path / "ckpt"), tmp_path / "int4", quantize="int4", shards=3)
    damage(folder)
    with pytest.raises(kind, match=said) as caught:
        Llama.build(folder, max_seq_len=16, max_batch_size=1)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/llama-was-here").exists()


def test_a_folder_must_say_whether_it_is_quantized(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ckpt")
    saved = convert(folder, tmp_path / "int4", quantize="int4")
    given = json.loads((saved / "params.json").read_text())
    del given["quantization"]
    (saved / "params.json").write_text(json.dumps(given))
    with pytest.raises(CheckpointError, match=r"00\.pth: unexpected .*scales and \d+ other tensors: not"):
        Llama.build(saved, max_seq_len=16, max_batch_size=1)


def test_a_folder_that_is_none() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        Llama.build("no-such-folder", max_seq_len=16, max_batch_size=1)


def test_llama_1_and_2_leave_things_out(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ckpt")
    given = json.loads((folder / "params.json").read_text())
    del given["rope_theta"]
    (folder / "params.json").write_text(json.dumps({**given, "vocab_size": -1}))
    model = Llama.build(folder, max_seq_len=16, max_batch_size=1).model
    assert (model.params.rope_theta, model.params.vocab_size) == (10000.0, tiny.VOCAB)


def test_reading_a_shard_never_executes_it(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    torch.save({"x": Evil()}, path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_shard(path)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [tiny.CUT, tiny.CUT | {"tok_embeddings": 1}])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_part_can_be_read_across_files(cut: dict[str, int], count: int, tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ckpt", count, cut=cut)
    source = NativeShards(find_shards(folder), ModelArgs(**read_params(folder)))
    state = tiny.random_model().state_dict()
    for name, shape in source.shapes.items():
        whole = state[name]
        assert torch.equal(source.read(name), whole)
        for dim, size in enumerate(shape):
            for start, stop in ((0, size // 2), (3, size - 5), (size - 1, size)):
                part = source.read(name, dim, (start, stop))
                assert torch.equal(part, whole.narrow(dim, start, stop - start)), (name, dim, start, stop)
        source.release()
