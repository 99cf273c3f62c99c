"""Joining the ranks that `torchrun` started, leaving them, and handling a lost one.

fairscale owns the topology, because callers' code queries it from fairscale.
"""

import atexit
import contextlib
import io
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from llama.errors import ArgumentError, RankError
from llama.parallel import ModelParallel

# How many live `Llama`s use the process group that `connect` made. The last one destroys it.
_users = 0
_groups = 0  # how many groups `connect` has made so far
_owner = False
# Without torchrun's own store, rank 0 serves one for as long as it holds this, and its later groups share
# it. If it ended with a group, a rank that asks for the next one before rank 0 would lose its connection.
_store: Store | None = None


def connect(model_parallel_size: int | None, device: torch.device) -> ModelParallel:
    """Join this process to its model-parallel group, as `torchrun` describes it.

    Without `torchrun` (no RANK in the environment) and without a process group made by the caller,
    this is a single rank, without rendezvous. Every `connect` needs one `disconnect`.

    Raises ValueError if `model_parallel_size` does not fit the number of processes.
    """
    global _users, _groups, _owner, _store
    if not dist.is_initialized() and "RANK" not in os.environ:
        if model_parallel_size not in (None, 1):
            raise ArgumentError(
                f"model_parallel_size={model_parallel_size} needs that many processes: "
                f"start with `torchrun --nproc_per_node {model_parallel_size} ...`"
            )
        _users += 1
        return ModelParallel()

    # Imported before there is a group: default arguments inside it would hold that one for ever.
    from fairscale.nn.model_parallel import initialize as topology

    if not dist.is_initialized():
        # Each group gets its own prefix: the store outlives the groups, and a process's second group
        # would find the addresses of the first.
        _store, rank, size = next(rendezvous("env://"))
        _groups += 1
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(f"llama/{_groups}", _store),
            rank=rank,
            world_size=size,
            device_id=device if device.type == "cuda" else None,
        )
        if device.type == "cuda":  # otherwise all ranks would allocate and capture on the first device
            torch.cuda.set_device(device)
        _owner = True
        atexit.register(_shut_down)

    world = dist.get_world_size()
    if not topology.model_parallel_is_initialized():
        size = model_parallel_size or world
        if size < 1 or world % size:
            raise ArgumentError(f"model_parallel_size={size} does not divide the {world} processes")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints three lines
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
    """fairscale's model-parallel group, or a single rank."""
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
    """Undo one `connect`; the last one destroys the process group if `connect` made it."""
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
def together(parallel: ModelParallel) -> Iterator[None]:
    """A context, with no collectives inside, that fails on every rank if it fails on one.

    Without it, a rank with a bad file would exit while the others waited for it forever.
    """
    error = None
    try:
        yield
    except Exception as own:
        error = own
    errors = [error]
    if parallel.size > 1:
        errors = [None] * parallel.size
        dist.all_gather_object(errors, error, parallel.group)
    if first := next((found for found in errors if found is not None), None):
        raise first


@contextlib.contextmanager
def lost_rank_as_error(parallel: ModelParallel) -> Iterator[None]:
    """Replace torch's traceback for a broken connection with a RankError that says what it means."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RankError(
            f"rank {parallel.rank} of {parallel.size} lost another rank while working; "
            "look at the first failure"
        ) from None
