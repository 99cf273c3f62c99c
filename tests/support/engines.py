"""Running requests on an engine with a small model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama.engine import Engine, Request
from llama.model import Row, Transformer
from llama.sampling import SamplingParams
from tests.support.tiny import small_model

GREEDY = SamplingParams(temperature=0, max_tokens=8)


class Counter:
    """The rows of every call of the model."""

    def __init__(self, model: Transformer) -> None:
        self.steps: list[list[Row]] = []
        hidden = model.hidden

        def counting(tokens: Tensor, rows: Sequence[Row]) -> Tensor:
            self.steps.append(list(rows))
            return hidden(tokens, rows)

        model.hidden = counting  # type: ignore[method-assign]

    def lengths(self) -> list[list[int]]:
        return [[row.length for row in rows] for rows in self.steps]


def finish(engine: Engine, *requests: Request) -> None:
    for _ in engine.run(requests):
        pass


def alone(prompt: list[int], params: SamplingParams, **changes: Any) -> Request:
    engine = Engine(small_model(max_batch_size=1, **changes), prefill_chunk=64)
    request = engine.add(prompt, params)
    finish(engine, request)
    return request


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
