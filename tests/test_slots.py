"""What the cache holds is reused only by requests that it is right for."""

import pytest
import torch

from llama.engine import Engine, Request
from llama.engine.edits import versions
from llama.model import Row, Transformer
from llama.sampling import SamplingParams
from tests.support.tiny import small_model

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPT = [5, 6, 7, 8, 9, 10, 11]


def answer(engine: Engine, prompt: list[int] = PROMPT, **options) -> Request:
    request = engine.add(prompt, GREEDY, **options)
    for _ in engine.run([request]):
        pass
    return request


def double(weight: torch.Tensor) -> torch.Tensor:
    return weight * 2


EDITS = {
    "in place": lambda model: model.layers[0].attention.wk.weight.mul_(2),
    "one row": lambda model: model.tok_embeddings.weight[6].zero_(),
    "load_state_dict": lambda model: model.load_state_dict(small_model(1).state_dict()),
    "assigned": lambda model: model.load_state_dict(small_model(1).state_dict(), assign=True),
    "data": lambda model: setattr(model.norm.weight, "data", double(model.norm.weight)),
    "another cache": Transformer.allocate_cache,
    "forward": lambda model: model(torch.tensor([[1, 2, 3]]), 0),
    "hidden": lambda model: model.hidden(torch.tensor([1, 2, 3]), [Row(0, 0, 3)]),
    "copy": lambda model: model.cache.copy(1, 0, 3),
    "clear": lambda model: model.cache.clear(0, 0, 3),
}


@pytest.mark.parametrize("static", [False, True], ids=["ragged", "static"])
@pytest.mark.parametrize("edit", EDITS)
def test_whatever_writes_weights_or_cache_is_noticed(edit: str, static: bool) -> None:
    model = small_model()
    engine = Engine(model, static=static)
    answer(engine)
    assert answer(engine).reused == len(PROMPT) - 1  # or there would be nothing to notice
    EDITS[edit](model)
    request = answer(engine)
    assert request.reused == 0
    fresh = small_model()
    fresh.load_state_dict(model.state_dict())
    assert request.tokens == answer(Engine(fresh)).tokens


def test_an_edit_while_requests_run_is_noticed_when_another_begins() -> None:
    model = small_model()
    engine = Engine(model)
    runs = engine.add(PROMPT, SamplingParams(temperature=0, max_tokens=20))
    for _ in range(5):
        engine.step()
    EDITS["in place"](model)
    begins = answer(engine, [*PROMPT, 3])
    assert begins.reused == 0
    fresh = small_model()
    fresh.load_state_dict(model.state_dict())
    assert begins.tokens == answer(Engine(fresh), [*PROMPT, 3]).tokens
    assert runs.finish_reason is None


def test_what_cannot_be_seen_is_told_by_forget() -> None:
    model = small_model()
    engine = Engine(model)
    answer(engine)
    before = versions(model)
    model.layers[0].attention.wk.weight.detach().numpy()[:] = 0.5
    assert versions(model) == before
    engine.forget()
    assert answer(engine).reused == 0


@pytest.mark.parametrize(
    ("first", "second", "reused"),
    [
        ([], [], 6),
        ([(0, "adapter")], [(0, "adapter")], 6),
        ([(0, "adapter")], [], 0),
        ([(0, "adapter")], [(0, "another")], 0),
        ([(2, "image")], [(2, "image")], 6),
        ([(2, "image")], [(2, "another image")], 2),
        ([(2, "image")], [(4, "image")], 2),
        ([(1, "image"), (4, "second")], [(1, "image"), (4, "another")], 4),
        ([(1, "image"), (4, "second")], [(1, "image")], 4),
        ([(1, "image")], [(1, "image"), (6, "later")], 6),
    ],
    ids=str,
)
def test_a_prefix_is_shared_only_as_far_as_its_keys_agree(first, second, reused) -> None:
    for keys, others in ((first, second), (second, first)):
        engine = Engine(small_model())
        answer(engine, prefix_keys=keys)
        assert answer(engine, prefix_keys=others).reused == reused
