"""Model parallelism: the process group, and linear layers cut across its ranks.

The layers know the shape of a matrix and which part of it is theirs, nothing about Llama. Each is
the tensor-parallel layer of Megatron-LM (Shoeybi et al. 2019, section 3) in a few lines: columns of
one matrix, then rows of the next, then one all-reduce. fairscale owns the topology, because code
around this package asks fairscale for it.
"""

import atexit
import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from llama.errors import ArgumentError, RankError

Span = tuple[int, int]


def merged(spans: list[Span]) -> list[Span]:
    """The same spans, in the same order, with each that begins where the last ended joined to it."""
    out = spans[:1]
    for start, stop in spans[1:]:
        if start == out[-1][1]:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


@dataclass(frozen=True)
class ModelParallel:
    """The ranks that hold one model together. The default is a world of one, without processes."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    source: int = 0  # global number of the group's first rank

    def span(self, n: int) -> Span:
        """This rank's half-open part of `n` things; parts differ by one where n doesn't divide."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    # The functional form of the collectives, which torch.compile takes whole.

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's `x`."""
        if self.group is None or self.size == 1:
            return x
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", self.group.group_name))

    def all_gather(self, x: Tensor, n: int) -> Tensor:
        """Put together (…, n) from every rank's `span(n)` of the last dimension."""
        if self.group is None or self.size == 1:
            return x
        ops = torch.ops._c10d_functional
        width = -(-n // self.size)  # a collective wants equal parts, so pad
        mine = F.pad(x, (0, width - x.shape[-1])).contiguous()
        all_ranks = ops.wait_tensor(ops.all_gather_into_tensor(mine, self.size, self.group.group_name))
        parts = all_ranks.unflatten(0, (self.size, -1))
        if n % self.size == 0:
            return torch.cat(parts.unbind(), -1)
        spans = [ModelParallel(rank, self.size).span(n) for rank in range(self.size)]
        return torch.cat([part[..., : b - a] for part, (a, b) in zip(parts, spans, strict=True)], -1)

    def broadcast(self, x: Tensor) -> Tensor:
        """`x` of the group's first rank, in place."""
        if self.size > 1:
            dist.broadcast(x, self.source, self.group)
        return x

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block, without collectives in it, that fails on every rank if it fails on one.

        Without this a rank with a bad file would leave, and the others would wait for it for ever.
        """
        error = None
        try:
            yield
        except Exception as own:
            error = own
        errors = [error]
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error, self.group)
        if first := next((found for found in errors if found is not None), None):
            raise first


# How many live `Llama`s use the process group that `connect` made. It goes down with the last one.
_users = 0
_groups = 0  # that `connect` has made so far
_owner = False


def connect(model_parallel_size: int | None, device: torch.device) -> ModelParallel:
    """Join this process to its model-parallel group, as `torchrun` describes it.

    Without `torchrun` (no RANK in the environment) and without a process group made by the caller,
    this is a world of one, with no rendezvous. Every `connect` wants one `disconnect`.

    Raises ValueError where `model_parallel_size` does not fit the number of processes.
    """
    global _users, _groups, _owner
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            if model_parallel_size not in (None, 1):
                raise ArgumentError(
                    f"model_parallel_size={model_parallel_size} needs that many processes: "
                    f"start with `torchrun --nproc_per_node {model_parallel_size} ...`"
                )
            _users += 1
            return ModelParallel()
        # A prefix of its own for each group: torchrun's store outlives them, and a second group of the
        # same process would find the addresses of the first.
        store, rank, size = next(rendezvous("env://"))
        _groups += 1
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(f"llama/{_groups}", store),
            rank=rank,
            world_size=size,
            device_id=device if device.type == "cuda" else None,
        )
        if device.type == "cuda":  # or all ranks would allocate and capture on the first one's
            torch.cuda.set_device(device)
        _owner = True
        atexit.register(_shut_down)

    from fairscale.nn.model_parallel import initialize as topology

    world = dist.get_world_size()
    if not topology.model_parallel_is_initialized():
        size = model_parallel_size or world
        if size < 1 or world % size:
            raise ArgumentError(f"model_parallel_size={size} does not divide the {world} processes")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints three lines of its own
            topology.initialize_model_parallel(size)
    size = topology.get_model_parallel_world_size()
    if model_parallel_size not in (None, size):
        raise ArgumentError(
            f"model_parallel_size={model_parallel_size}, but this process already belongs to a "
            f"model-parallel group of {size}"
        )
    _users += 1
    return current()


def current() -> ModelParallel:
    """The model-parallel group that fairscale knows, or a world of one."""
    if not (dist.is_available() and dist.is_initialized()):
        return ModelParallel()
    from fairscale.nn.model_parallel import initialize as topology

    if not topology.model_parallel_is_initialized():
        return ModelParallel()
    return ModelParallel(
        rank=topology.get_model_parallel_rank(),
        size=topology.get_model_parallel_world_size(),
        group=topology.get_model_parallel_group(),
        source=topology.get_model_parallel_src_rank(),
    )


def disconnect() -> None:
    """Give back one `connect`; the last one takes down the process group if `connect` made it."""
    global _users
    _users -= 1
    if _users == 0:
        _shut_down()


def _shut_down() -> None:
    global _owner
    if _owner and dist.is_initialized():
        from fairscale.nn.model_parallel import initialize as topology

        topology.destroy_model_parallel()
        dist.destroy_process_group()
    _owner = False


@contextlib.contextmanager
def lost_rank_as_error(parallel: ModelParallel) -> Iterator[None]:
    """Say in one sentence what a broken connection means, where torch gives an address and a stack."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RankError(
            f"rank {parallel.rank} of {parallel.size} lost another rank in the middle of its work; "
            "the first failure is the one to look at"
        ) from None


class Product(Protocol):
    """x Wᵀ, (…, in) to (…, out), by a weight in whatever form; nbytes: what the weight takes."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class Linear(nn.Module):
    """y = x Wᵀ without a bias, weight (out, in).

    Every matrix of the model is applied here or in `Joined` and nowhere else, so that a backend
    (packed, int8, int4) is chosen in one place, after loading, by walking the modules.
    """

    backend: Product | None = None  # in place of the weight

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.backend(x) if self.backend else F.linear(x, self.weight)


class Sharded:
    """What a loader must know of a sharded weight: `spans` of dimension `dim` of the whole `shape`."""

    shape: tuple[int, int]
    dim: int
    spans: list[Span]


class ColumnParallelLinear(Linear, Sharded):
    """(…, in) to this rank's part of (…, out).

    spans: rows of the whole weight that this rank holds, where it is not the plain n-th part.
    """

    def __init__(
        self, in_features: int, out_features: int, parallel: ModelParallel, spans: list[Span] | None = None
    ) -> None:
        spans = spans or [parallel.span(out_features)]
        super().__init__(in_features, sum(stop - start for start, stop in spans))
        self.shape, self.dim, self.spans = (out_features, in_features), 0, spans


class RowParallelLinear(Linear, Sharded):
    """This rank's part of (…, in), by `spans`, to the whole (…, out), summed over the ranks."""

    def __init__(self, in_features: int, out_features: int, parallel: ModelParallel, unit: int = 1) -> None:
        """unit: features that stay together (a head), so that rank borders fall between them."""
        start, stop = parallel.span(in_features // unit)
        super().__init__((stop - start) * unit, out_features)
        self.shape, self.dim = (out_features, in_features), 1
        self.spans = [(start * unit, stop * unit)]
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        return self.parallel.all_reduce(super().forward(x))


class VocabParallelEmbedding(nn.Module, Sharded):
    """Token ids (…) to vectors (…, dim), the vocabulary split over the ranks."""

    backend: Product | None = None  # if the weight is where only a step of a backend's own can read it

    def __init__(self, vocab_size: int, dim: int, parallel: ModelParallel) -> None:
        super().__init__()
        self.shape, self.dim = (vocab_size, dim), 0
        self.start, self.stop = parallel.span(vocab_size)
        self.spans = [(self.start, self.stop)]
        self.parallel = parallel
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, dim), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.parallel.size == 1:
            return F.embedding(tokens, self.weight)
        elsewhere = (tokens < self.start) | (tokens >= self.stop)
        local = (tokens - self.start).masked_fill(elsewhere, 0)
        vectors = F.embedding(local, self.weight).masked_fill(elsewhere[..., None], 0)
        return self.parallel.all_reduce(vectors)


class Joined(nn.Module):
    """Linears that read the same input, as one matrix: (…, in) to (…, sum of their outs).

    The parts stay registered, and named in a state dict, where they belong.
    """

    backend: Product | None = None
    weight: Tensor | None = None

    def __init__(self, *parts: Linear) -> None:
        super().__init__()
        self.parts = parts  # a tuple, which does not register them here a second time

    def join(self) -> None:
        """Put the weights of the parts into one matrix, of which they become views."""
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


def matrices(model: torch.nn.Module) -> list[tuple[str, Linear | Joined, dict[str, Linear]]]:
    """Each matrix that is applied as one: its name, who applies it, and its linears by weights' names."""
    linears = {module: name for name, module in model.named_modules() if isinstance(module, Linear)}
    found: list[tuple[str, Linear | Joined, dict[str, Linear]]] = []
    for name, joined in model.named_modules():
        if isinstance(joined, Joined):
            found.append((name, joined, {f"{linears.pop(part)}.weight": part for part in joined.parts}))
    return [*found, *((name, linear, {f"{name}.weight": linear}) for linear, name in linears.items())]


def resident_bytes(model: nn.Module) -> int:
    """Memory that a loaded model's weights take, in whatever form; what is shared counts once."""
    backends = {getattr(module, "backend", None) for module in model.modules()}
    products = [backend.nbytes for backend in backends if backend is not None]
    return sum(products) + sum(weight.nbytes for weight in model.parameters())
