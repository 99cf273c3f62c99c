"""The model against Meta's implementation and Hugging Face's, and its rotary table against known values."""

from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist

from llama.model import ModelArgs, Row, Transformer, attend, local_kv_heads, rope_frequencies
from llama.parallel import ModelParallel
from tests.support import tiny
from tests.support.formats import hf_model

TOLERANCE = 1e-4
HEADS = {"MHA": (8, 8), "GQA": (8, 2), "MQA": (8, 1)}


@pytest.fixture
def one_rank_group() -> Iterator[None]:
    """Meta's model asks fairscale for its group, even when it is alone."""
    from fairscale.nn.model_parallel import initialize as topology

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    topology.initialize_model_parallel(1)
    yield
    topology.destroy_model_parallel()
    dist.destroy_process_group()


def meta_model(model: Transformer) -> torch.nn.Module:
    from llama_models.llama3.args import ModelArgs as MetaArgs
    from llama_models.llama3.model import Transformer as MetaTransformer

    oracle = MetaTransformer(MetaArgs(**asdict(model.params)))
    oracle.load_state_dict(model.state_dict())
    return oracle


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("scaled", [False, True], ids=["plain rope", "scaled rope"])
@pytest.mark.parametrize("heads", HEADS)
def test_agrees_with_metas_model(heads: str, scaled: bool) -> None:
    n_heads, n_kv_heads = HEADS[heads]
    model = tiny.random_model(n_heads=n_heads, n_kv_heads=n_kv_heads, use_scaled_rope=scaled, std=0.1)
    oracle = meta_model(model)
    tokens = torch.randint(0, tiny.VOCAB, (3, 24))
    torch.testing.assert_close(model(tokens, 0), oracle(tokens, 0), atol=TOLERANCE, rtol=0)
    # in chunks, the last of them single tokens, and once more from the middle
    for start, stop in ((0, 9), (9, 21), (21, 22), (22, 23), (12, 24)):
        expected = oracle(tokens[:, start:stop], start)
        torch.testing.assert_close(model(tokens[:, start:stop], start), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("args", "tied"),
    [
        ({"n_kv_heads": 8}, False),
        ({"n_kv_heads": 1}, True),
        ({"use_scaled_rope": True, "rope_scaling_factor": 8.0}, False),
        ({"use_scaled_rope": True, "rope_scaling_factor": 32.0}, True),
        ({"ffn_dim_multiplier": 1.3, "multiple_of": 32, "rope_theta": 10000.0, "norm_eps": 1e-6}, False),
    ],
    ids=["MHA", "MQA tied", "rope factor 8", "rope factor 32 tied", "wide feed-forward"],
)
def test_agrees_with_transformers(args: dict, tied: bool) -> None:
    model = tiny.random_model(std=0.1, **args)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    tokens = torch.randint(0, tiny.VOCAB, (2, 24))
    with torch.no_grad():
        expected = hf_model(model, tied)(tokens).logits
    torch.testing.assert_close(model(tokens, 0), expected, atol=TOLERANCE, rtol=0)


def test_far_positions_agree_with_transformers() -> None:
    """Where the scaled frequencies matter: thousands of positions in."""
    model = tiny.random_model(std=0.1, n_layers=1, use_scaled_rope=True, max_seq_len=6000, max_batch_size=1)
    tokens = torch.randint(0, tiny.VOCAB, (1, 6000))
    with torch.no_grad():
        expected = hf_model(model)(tokens, logits_to_keep=8).logits
    model(tokens[:, :5992], 0)
    torch.testing.assert_close(model(tokens[:, 5992:], 5992), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("head_dim", "factor", "kept", "blended", "divided", "last"),
    [(128, 8.0, 29, 6, 29, 3.06893e-07), (64, 32.0, 15, 3, 14, 9.41831e-08)],
)
def test_scaled_rope_has_the_published_frequencies(head_dim, factor, kept, blended, divided, last) -> None:
    args = ModelArgs(dim=head_dim, n_heads=1, use_scaled_rope=True, rope_scaling_factor=factor)
    plain = rope_frequencies(ModelArgs(dim=head_dim, n_heads=1))
    scaled = rope_frequencies(args)
    same, all_of_it = scaled == plain, torch.isclose(scaled, plain / factor, rtol=1e-6)
    assert (same.sum(), all_of_it.sum()) == (kept, divided)
    assert len(plain) - kept - divided == blended
    assert scaled[-1].item() == pytest.approx(last, rel=1e-5)


def test_the_rope_factor_follows_from_the_shape() -> None:
    def factor(**args: object) -> float | None:
        return ModelArgs(n_heads=32, **args).rope_scaling_factor

    assert factor(dim=2048, n_layers=16, use_scaled_rope=True) == 32  # 3.2 1B
    assert (
        ModelArgs(dim=3072, n_layers=28, n_heads=24, use_scaled_rope=True).rope_scaling_factor == 32
    )  # 3.2 3B
    assert factor(dim=4096, n_layers=32, use_scaled_rope=True) == 8  # 3.1 8B
    assert factor(dim=4096, n_layers=32, use_scaled_rope=True, rope_scaling_factor=4.0) == 4
    assert factor(dim=4096, n_layers=32) is None


@pytest.mark.parametrize(
    ("args", "parameters"),
    [
        (dict(dim=4096, n_layers=32, n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3), 8_030_261_248),
        (
            dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
            70_553_706_496,
        ),
        (
            dict(
                dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.2
            ),
            405_853_388_800,
        ),
    ],
    ids=["8B", "70B", "405B"],
)
def test_released_shapes_have_the_published_size(args: dict, parameters: int) -> None:
    with torch.device("meta"):
        model = Transformer(ModelArgs(vocab_size=128256, **args))
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_a_ragged_step_equals_its_rows_alone() -> None:
    """Prefill, chunked prefill and decode of sequences of other lengths, in one call."""
    model, alone = tiny.random_model(), tiny.random_model()
    tokens = torch.randint(0, tiny.VOCAB, (4, 40))
    expected = [alone(tokens[i : i + 1, :n], 0)[0, -1] for i, n in enumerate((5, 17, 1, 30))]

    model.hidden(torch.cat([tokens[1, :16], tokens[3, :20]]), [Row(1, 0, 16), Row(3, 0, 20)])
    rows = [Row(0, 0, 5), Row(1, 16, 1), Row(2, 0, 1), Row(3, 20, 10)]
    step = torch.cat([tokens[row.slot, row.start : row.stop] for row in rows])
    last = torch.tensor([row.length for row in rows]).cumsum(0) - 1
    logits = model.logits(model.hidden(step, rows)[last])
    torch.testing.assert_close(logits, torch.stack(expected), atol=TOLERANCE, rtol=0)


def test_forward_takes_a_position_per_row() -> None:
    model = tiny.random_model()
    tokens = torch.randint(0, tiny.VOCAB, (2, 12))
    whole = model(tokens, 0)
    model(tokens[:1, :10], 0)
    model(tokens[:, :4], 0)
    logits = model(torch.stack([tokens[0, 10:], tokens[1, 4:6]]), torch.tensor([10, 4]))
    torch.testing.assert_close(logits, torch.stack([whole[0, 10:], whole[1, 4:6]]), atol=TOLERANCE, rtol=0)
    assert logits.dtype == torch.float32


def test_reads_only_the_live_part_of_the_cache() -> None:
    model = tiny.random_model()
    tokens = torch.randint(0, tiny.VOCAB, (1, 8))
    clean = model(tokens, 0)
    model.cache.data.fill_(float("nan"))
    assert torch.equal(model(tokens, 0), clean)


def test_attention_of_one_query_equals_the_last_of_many() -> None:
    q, keys, values = torch.randn(6, 8, 16), torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    torch.testing.assert_close(attend(q[-1:], keys, values, None), attend(q, keys, values, None)[-1:])


def test_key_heads_repeat_in_order_where_ranks_are_many() -> None:
    def heads(n_heads: int, n_kv_heads: int, size: int) -> list[list[int]]:
        args = ModelArgs(dim=8 * n_heads, n_heads=n_heads, n_kv_heads=n_kv_heads)
        return [local_kv_heads(args, ModelParallel(rank, size)) for rank in range(size)]

    assert heads(8, 4, 1) == [[0, 1, 2, 3]]
    assert heads(8, 4, 2) == [[0, 1], [2, 3]]
    assert heads(8, 2, 4) == [[0], [0], [1], [1]]
    assert heads(6, 3, 2) == [[0, 0, 1], [1, 2, 2]]  # a border in the middle of a group
    assert heads(6, 2, 6) == [[0], [0], [0], [1], [1], [1]]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"dim": 0}, "dim"),
        ({"dim": 60, "n_heads": 7}, "n_heads=7"),
        ({"n_heads": 8, "n_kv_heads": 3}, "n_kv_heads=3"),
        ({"max_seq_len": -1}, "max_seq_len"),
        ({"max_batch_size": 1.5}, "max_batch_size"),
    ],
)
def test_impossible_arguments_are_named(args: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelArgs(**args)


def test_a_step_beyond_the_cache_is_an_error_with_the_numbers() -> None:
    model = tiny.random_model(max_seq_len=8, max_batch_size=1)
    with pytest.raises(ValueError, match="max_seq_len=8"):
        model(torch.zeros(1, 9, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="max_batch_size=1"):
        model(torch.zeros(2, 1, dtype=torch.int64), 0)


def test_a_vocabulary_must_be_given() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        Transformer(ModelArgs(dim=64, n_layers=1, n_heads=2))


def test_ranks_must_divide_the_heads() -> None:
    with pytest.raises(
        ValueError, match=r"8 attention heads do not divide evenly among 3 ranks; use one of \[1, 2, 4, 8\]"
    ):
        Transformer(ModelArgs(**tiny.PARAMS), ModelParallel(0, 3))
