"""Steps captured as CUDA graphs: the only part of the engine that needs a GPU."""

import atexit
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[Tensor, Tensor, int], Tensor]  # tokens, positions and live positions, to logits


class Graphs:
    """A step captured once per shape. Only one step runs at a time, so all graphs share their memory."""

    def __init__(self, device: torch.device, run: Run) -> None:
        self.run = run
        self.stream = torch.cuda.Stream(device)
        self.clear()
        # NCCL's shutdown hangs while a graph holds its collectives.
        atexit.register(_clear, weakref.ref(self))

    def clear(self) -> None:
        self.graphs: dict[tuple[int, int], Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def replay(self, tokens: Tensor, positions: Tensor, live: int) -> Tensor:
        """What `run` returns, from a graph of this shape, captured first if there is none."""
        shape = len(tokens), live
        if shape not in self.graphs:
            self.graphs[shape] = Graph(self, tokens, positions, live)
        return self.graphs[shape].replay(tokens, positions)


def _clear(graphs: weakref.ReferenceType[Graphs]) -> None:
    if alive := graphs():
        alive.clear()


class Graph:
    """A step of one shape."""

    def __init__(self, graphs: Graphs, tokens: Tensor, positions: Tensor, live: int) -> None:
        self.inputs = tokens.clone(), positions.clone()
        graphs.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(graphs.stream):  # compiles and allocates
            for _ in range(2):
                graphs.run(*self.inputs, live)
        torch.cuda.current_stream().wait_stream(graphs.stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may call CUDA at the same time.
        mode = "thread_local"
        with torch.cuda.graph(self.graph, graphs.pool, graphs.stream, capture_error_mode=mode):
            self.logits = graphs.run(*self.inputs, live)

    def replay(self, *inputs: Tensor) -> Tensor:
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites it
