"""Linear layers split across ranks, and the collectives between them.

The layers know the shape of a matrix and which part of it is theirs, and nothing about Llama. They
are the tensor-parallel layers of Megatron-LM (Shoeybi et al. 2019, section 3) in a few lines: columns
of one matrix, then rows of the next, then one all-reduce.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Span = tuple[int, int]


def merged(spans: list[Span]) -> list[Span]:
    """The same spans in the same order, with adjacent ones joined."""
    out = spans[:1]
    for start, stop in spans[1:]:
        if start == out[-1][1]:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


@dataclass(frozen=True)
class ModelParallel:
    """The ranks that share one model. The default is a single rank, without a process group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    source: int = 0  # global number of the group's first rank

    def span(self, n: int) -> Span:
        """This rank's half-open part of `n` items; part sizes differ by at most one."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    # The functional form of the collectives, which torch.compile can trace.

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`."""
        if self.group is None or self.size == 1:
            return x
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", self.group.group_name))

    def all_gather(self, x: Tensor, n: int) -> Tensor:
        """Assemble (…, n) from every rank's `span(n)` of the last dimension."""
        if self.group is None or self.size == 1:
            return x
        ops = torch.ops._c10d_functional
        width = -(-n // self.size)  # collectives need equal parts, so pad
        mine = F.pad(x, (0, width - x.shape[-1])).contiguous()
        all_ranks = ops.wait_tensor(ops.all_gather_into_tensor(mine, self.size, self.group.group_name))
        parts = all_ranks.unflatten(0, (self.size, -1))
        if n % self.size == 0:
            return torch.cat(parts.unbind(), -1)
        spans = [ModelParallel(rank, self.size).span(n) for rank in range(self.size)]
        return torch.cat([part[..., : b - a] for part, (a, b) in zip(parts, spans, strict=True)], -1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Overwrite `x` with that of the group's first rank."""
        if self.size > 1:
            dist.broadcast(x, self.source, self.group)
        return x


class Product(Protocol):
    """x Wᵀ, (…, in) to (…, out), with a weight in any form; nbytes: the weight's size in bytes."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class Embedded(Product, Protocol):
    """A product that can also look up rows: embeddings that may double as the output layer."""

    def embed(self, tokens: Tensor) -> Tensor: ...


class Linear(nn.Module):
    """y = x Wᵀ without a bias, weight (out, in).

    Every matrix of the model is applied either here or in `Joined`, so a backend (packed, int8, int4)
    can be chosen in one place, after loading, by walking the modules.
    """

    backend: Product | None = None  # replaces the weight

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.backend(x) if self.backend else F.linear(x, self.weight)


class Sharded:
    """What a loader needs to know about a sharded weight: `spans` of dimension `dim` of the full `shape`."""

    shape: tuple[int, int]
    dim: int
    spans: list[Span]


class ColumnParallelLinear(Linear, Sharded):
    """(…, in) to this rank's part of (…, out).

    spans: rows of the full weight that this rank holds; by default its `parallel.span`.
    """

    def __init__(
        self, in_features: int, out_features: int, parallel: ModelParallel, spans: list[Span] | None = None
    ) -> None:
        spans = spans or [parallel.span(out_features)]
        super().__init__(in_features, sum(stop - start for start, stop in spans))
        self.shape, self.dim, self.spans = (out_features, in_features), 0, spans


class RowParallelLinear(Linear, Sharded):
    """This rank's part of (…, in), given by `spans`, to the full (…, out), summed over the ranks."""

    def __init__(self, in_features: int, out_features: int, parallel: ModelParallel, unit: int = 1) -> None:
        """unit: features that must stay on one rank, such as a head's."""
        start, stop = parallel.span(in_features // unit)
        super().__init__((stop - start) * unit, out_features)
        self.shape, self.dim = (out_features, in_features), 1
        self.spans = [(start * unit, stop * unit)]
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        return self.parallel.all_reduce(super().forward(x))


class VocabParallelEmbedding(nn.Module, Sharded):
    """Token ids (…) to vectors (…, dim), with the vocabulary split across the ranks."""

    backend: Embedded | None = None  # replaces the weight

    def __init__(self, vocab_size: int, dim: int, parallel: ModelParallel) -> None:
        super().__init__()
        self.shape, self.dim = (vocab_size, dim), 0
        self.start, self.stop = parallel.span(vocab_size)
        self.spans = [(self.start, self.stop)]
        self.parallel = parallel
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, dim), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.backend:
            return self.backend.embed(tokens)
        if self.parallel.size == 1:
            return F.embedding(tokens, self.weight)
        elsewhere = (tokens < self.start) | (tokens >= self.stop)
        local = (tokens - self.start).masked_fill(elsewhere, 0)
        vectors = F.embedding(local, self.weight).masked_fill(elsewhere[..., None], 0)
        return self.parallel.all_reduce(vectors)


class Joined(nn.Module):
    """Linear layers with the same input, applied as one matrix: (…, in) to (…, sum of their outs).

    The parts stay registered, and named in the state dict, in their own modules.
    """

    backend: Product | None = None
    weight: Tensor | None = None

    def __init__(self, *parts: Linear) -> None:
        super().__init__()
        self.parts = parts  # a tuple, so that they are not registered a second time

    def join(self) -> None:
        """Concatenate the parts' weights into one matrix and make them views of it."""
        self.weight = torch.cat([part.weight for part in self.parts])
        sizes = [len(part.weight) for part in self.parts]
        for part, rows in zip(self.parts, self.weight.split(sizes), strict=True):
            part.weight = nn.Parameter(rows, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.backend:
            return self.backend(x)
        if self.weight is not None:
            return F.linear(x, self.weight)
        return torch.cat([part(x) for part in self.parts], -1)
