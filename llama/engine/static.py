"""Decoding at shapes that stay the same, one step ahead of who reads the tokens.

A ragged step has other shapes every time, so each is launched operator by operator. Here every slot
from llama.errors import ArgumentError
from the first to the last one in use takes part, with or without a token: a compiler takes such a step
whole, and on CUDA it is captured once for each shape and replayed as a graph. Its tokens stay on the
device, where the next step finds them; the host reads them while that one runs.
"""

import atexit
import importlib.util
import inspect
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llama.device import to_device
from llama.engine.request import Request
from llama.errors import ArgumentError
from llama.model import Transformer
from llama.parallel import lost_rank_as_error
from llama.sampling import NUCLEUS_SHORTCUT, SamplingParams, draw, draw_among, settings, token_logprobs

BROKEN = -1  # in place of a token, where the logits are not finite
# What only training needs is left out, where this PyTorch (2.9 and newer) can.
FORWARD_ONLY: dict[str, Any] = (
    {"compute_q_blocks": False}
    if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters
    else {}
)
BLOCK = 128  # positions of the cache that flex attention reads or leaves out together


def power_of_two(n: int, most: int) -> int:
    """The next power of two, or `most` where that is less."""
    return min(1 << (n - 1).bit_length(), most)


class StaticStep:
    """One token in each of the first n slots, under a mask.

    positions: int64 (n), where each token goes, or -1 for a slot without one, whose cache stays as it
    is. live: attention looks at so many positions of each slot, which is more than any of `positions`.
    """

    def __init__(self, rotations: Tensor, positions: Tensor, live: int) -> None:
        self.active = (positions >= 0)[:, None, None, None]
        self.positions = positions.clamp(min=0)
        self.rotation = rotations[self.positions]
        self.slots = torch.arange(len(positions), device=positions.device)
        self.live = live
        self.mask = self.masked()

    def masked(self) -> Any:
        reach = torch.arange(self.live, device=self.positions.device) <= self.positions[:, None]
        return reach[:, None, None]

    def attend(self, queries: Tensor, kv: Tensor, cache: Tensor) -> Tensor:
        before = cache[:, self.slots, :, self.positions]  # (n, 2, n_kv_heads, head_dim)
        cache[:, self.slots, :, self.positions] = torch.where(self.active, kv, before)
        keys, values = cache[:, : len(queries), :, : self.live]
        # The heads that share a key head stand in as the rows of one query.
        folded = queries.reshape(len(queries), keys.shape[1], -1, queries.shape[-1])
        return self.look(folded, keys, values).view_as(queries)

    def look(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask)


class FlexStep(StaticStep):
    """The same by flex attention, which reads of each slot the blocks that are alive and no others."""

    def __init__(self, rotations: Tensor, positions: Tensor, live: int, group: int) -> None:
        """group: query heads to each key head."""
        self.group = group
        super().__init__(rotations, positions, live)

    def masked(self) -> Any:
        reach, blocks = self.positions, -(-self.live // BLOCK)
        return BlockMask.from_kv_blocks(
            (reach // BLOCK + 1).int()[:, None, None],
            torch.arange(blocks, dtype=torch.int32, device=reach.device).repeat(len(reach), 1, 1, 1),
            BLOCK_SIZE=BLOCK,
            mask_mod=lambda slot, head, query, position: position <= reach[slot],
            seq_lengths=(self.group, self.live),
            **FORWARD_ONLY,
        )

    def look(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if queries.device.type == "cpu":
            queries = queries * 1.0  # the CPU's kernel takes no views
        else:
            torch._dynamo.mark_static(queries, 0)  # or there is no kernel that splits the positions
        return flex_attention(queries, keys, values, block_mask=self.mask)


class Decoder:
    """The next token's logits of some slots.

    flex: whether by flex attention, whose kernels for CPUs are slow.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.graphs: dict[tuple[int, int], Graph] = {}
        self.captures = self.flex = model.device.type == "cuda"
        if self.captures:
            # One step runs at a time, so all graphs may share their memory.
            self.stream = torch.cuda.Stream(model.device)
            self.pool = torch.cuda.graph_pool_handle()
            # NCCL waits for ever to be taken down while a graph holds its collectives.
            atexit.register(_close, weakref.ref(self))

    def close(self) -> None:
        """Let go of the graphs."""
        self.graphs.clear()

    def rows(self, slots: Iterable[int]) -> int:
        """How many slots take part in a step for some of them: a power of two, so that shapes are few."""
        return power_of_two(max(slots) + 1, self.model.params.max_batch_size)

    def decode(self, requests: Mapping[int, Request], positions: Mapping[int, int]) -> Tensor:
        """Logits, fp32 (n, vocab_size), after the last token of the requests in some slots."""
        tokens = [requests[i].tokens[-1] if i in requests else 0 for i in range(self.rows(requests))]
        return self.follow(to_device(tokens, self.model.device), positions)

    def follow(self, tokens: Tensor, positions: Mapping[int, int]) -> Tensor:
        """The same for tokens that are on the device, int64 (n)."""
        where = to_device([positions.get(slot, -1) for slot in range(len(tokens))], tokens.device)
        with torch.cuda.device_of(tokens):
            return self(tokens, where, max(positions.values()))

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Tensor, reach: int) -> Tensor:
        """Logits, fp32 (n, vocab_size), after one token in each of the first n slots.

        tokens: int64 (n). positions: int64 (n), -1 for slots without a token, which get anything.
        reach: the largest position.
        """
        if self.flex:
            try:
                return self._replay(tokens, positions, self.model.params.max_seq_len)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError | dist.DistError) or "gloo" in str(error):
                    raise  # that has other reasons
                reason = str(error).partition("\n")[0]
                warnings.warn(f"decoding without flex attention, which failed: {reason}", stacklevel=2)
                self.flex = False
                self.graphs.clear()
                if self.captures:
                    self.pool = torch.cuda.graph_pool_handle()
        live = power_of_two(max(reach + 1, BLOCK), self.model.params.max_seq_len)
        return self._replay(tokens, positions, live)

    def _replay(self, tokens: Tensor, positions: Tensor, live: int) -> Tensor:
        if not self.captures:
            return self.run(tokens, positions, live)
        shape = len(tokens), live
        if shape not in self.graphs:
            self.graphs[shape] = Graph(self, tokens, positions, live)
        return self.graphs[shape].replay(tokens, positions)

    def run(self, tokens: Tensor, positions: Tensor, live: int) -> Tensor:
        model = self.model
        group = model.params.n_heads // model.parallel.size // model.cache.shape[3]
        step = (
            FlexStep(model.rotations, positions, live, group)
            if self.flex
            else StaticStep(model.rotations, positions, live)
        )
        return self.model.logits(self.model.run(tokens, step))


def _close(decoder: weakref.ReferenceType[Decoder]) -> None:
    if alive := decoder():
        alive.close()


class Graph:
    """A step of one shape, captured as a CUDA graph."""

    def __init__(self, decoder: Decoder, tokens: Tensor, positions: Tensor, live: int) -> None:
        self.inputs = tokens.clone(), positions.clone()
        decoder.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(decoder.stream):  # what compiles or allocates does so now
            for _ in range(2):
                decoder.run(*self.inputs, live)
        torch.cuda.current_stream().wait_stream(decoder.stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, as NCCL's watchdog, may call CUDA meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(self.graph, decoder.pool, decoder.stream, capture_error_mode=mode):
            self.logits = decoder.run(*self.inputs, live)

    def replay(self, *inputs: Tensor) -> Tensor:
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.logits.clone()  # the next replay writes there


class Landed(NamedTuple):
    token: int  # or BROKEN
    logprob: float
    redone: bool  # whether it is another token than the one that the next step may have begun with


@dataclass
class Flight:
    """A step that the device may still be at. Rows are slots."""

    requests: dict[int, Request]
    tokens: Tensor  # int64 (n), the input of the next step
    logits: Tensor  # fp32 (n, vocab_size)
    settings: Tensor  # of `draw`
    outcome: Tensor  # fp32 (3, n) on the host: tokens, whether more must be looked at, logprobs
    ready: torch.cuda.Event | None  # when it is there

    def land(self, model: Transformer) -> dict[int, Landed]:
        """Wait for the step, and say what came of it for each slot."""
        if self.ready:
            self.ready.synchronize()
        tokens, larger, logprobs = self.outcome.tolist()
        landed = {slot: Landed(int(tokens[slot]), logprobs[slot], False) for slot in self.requests}
        # A nucleus larger than the shortcut: seldom, and the only reason to look at all logits again.
        for slot in [slot for slot in self.requests if larger[slot]]:
            row = slice(slot, slot + 1)
            exact = model.parallel.broadcast(draw(self.logits[row], self.settings[:, row]))
            logprob = token_logprobs(self.logits[row], exact).item()
            landed[slot] = Landed(int(exact.item()), logprob, exact.item() != tokens[slot])
        return landed


def launch(
    decoder: Decoder, requests: Mapping[int, Request], positions: Mapping[int, int], ahead: Flight | None
) -> Flight:
    """Start a step for the requests in some slots, and choose their tokens, waiting for nothing.

    positions: where in its slot each request's last token goes. ahead: the step before, if that token is
    still to be read from it.
    """
    model = decoder.model
    device, vocab_size = model.device, model.params.vocab_size
    n = decoder.rows(requests)
    params = {slot: request.params for slot, request in requests.items()}
    with lost_rank_as_error(model.parallel), torch.inference_mode(), torch.cuda.device_of(model.norm.weight):
        logits = decoder.follow(ahead.tokens, positions) if ahead else decoder.decode(requests, positions)
        idle = replace(next(iter(params.values())), temperature=0.0)
        rows = [params.get(slot, idle) for slot in range(n)]
        counts = [len(requests[i].tokens) + bool(ahead) if i in requests else 0 for i in range(n)]
        numbers = settings(rows, counts, vocab_size, device)
        chosen, larger = logits.argmax(-1), torch.zeros(n, dtype=torch.bool, device=device)
        if any(p.temperature > 0 for p in params.values()):
            samples = to_device([p.temperature > 0 for p in rows], device)
            # Who keeps all tokens anyway would only land to be drawn again.
            look = vocab_size if any(_keeps_more(p) for p in params.values()) else NUCLEUS_SHORTCUT
            drawn, larger = draw_among(logits, numbers, look)
            chosen, larger = torch.where(samples, drawn, chosen), larger & samples
        finite = logits.amax(-1).isfinite()
        chosen, larger = torch.where(finite, chosen, BROKEN), larger & finite
        known = chosen.clamp(min=0)
        logprobs = torch.zeros(n, dtype=torch.float32, device=device)
        if any(p.logprobs for p in params.values()):
            logprobs = token_logprobs(logits, known)
        result = torch.stack((chosen.float(), larger.float(), logprobs))
        model.parallel.broadcast(result)  # kernels may differ between ranks; the tokens must not
        known = result[0].long().clamp(min=0)
        ready = None
        if device.type == "cuda":
            result = torch.empty_like(result, device="cpu", pin_memory=True).copy_(result, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        return Flight(dict(requests), known, logits, numbers, result, ready)


def _keeps_more(params: SamplingParams) -> bool:
    """Whether a request's draws are from more tokens than the shortcut, whatever the logits."""
    if params.temperature == 0:
        return False
    if params.top_k is not None:
        return params.top_k > NUCLEUS_SHORTCUT
    return params.top_p >= 1 and params.min_p == 0


def compile_blocks(model: Transformer) -> None:
    """Compile the model's blocks, once for all layers, and the output layer.

    A ragged step's attention stays outside of it: prompts are read in compiled parts around it.
    """
    # Of each kind of step and, on CUDA, number of slots there is a variant, and models share the count.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for module in (*model.layers, model.output):
        module.compile(dynamic=True)


def check_compile(compile: bool | str, device: torch.device) -> bool:
    """Whether to compile for a device. Raises ValueError for what is not "auto", True or False."""
    if compile not in ("auto", True, False):
        raise ArgumentError(f'compile must be "auto", True or False, not {compile!r}')
    if device.type == "cuda" and compile:
        capable = torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (7, 0)
        if compile == "auto":
            return capable and importlib.util.find_spec("triton") is not None
        if importlib.util.find_spec("triton") is None:
            raise ArgumentError(
                "compile=True needs the triton package on CUDA: install it, or leave compile out"
            )
    return compile is True
