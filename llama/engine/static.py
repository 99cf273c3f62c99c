"""Decoding at fixed shapes, one step ahead of the tokens already read.

A ragged step has different shapes every time, so its operators are launched one by one. Here every
slot up to the last one in use takes part, with or without a token: such a step can be compiled whole,
and on CUDA it is captured once per shape and replayed as a graph. Its tokens stay on the device as
input for the next step; the host reads them while that step runs.
"""

import importlib.util
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llama.backends.onednn import Packed
from llama.device import to_device
from llama.engine.cuda_graph import Graphs
from llama.engine.outcomes import Outcome, choose_next
from llama.engine.request import Request, Work
from llama.engine.runners import Done, Pending
from llama.errors import ArgumentError
from llama.model import RaggedStep, Transformer
from llama.ranks import lost_rank_as_error
from llama.sampling import SamplingParams, choose, columns, token_logprobs

# Leave out what only training needs, if this PyTorch supports it (2.9 and newer).
FORWARD_ONLY: dict[str, Any] = (
    {"compute_q_blocks": False}
    if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters
    else {}
)
BLOCK = 128  # cache positions that flex attention reads or skips together


def power_of_two(n: int, most: int) -> int:
    """The next power of two, at most `most`."""
    return min(1 << (n - 1).bit_length(), most)


class StaticStep:
    """One token in each of the first n slots, under a mask.

    positions: int64 (n), each token's position, or -1 for a slot without one, whose cache is unchanged.
    live: how many positions of each slot attention covers; more than any of `positions`.
    """

    def __init__(self, rotations: Tensor, positions: Tensor, live: int) -> None:
        self.active = (positions >= 0)[:, None, None, None]
        self.positions = positions.clamp(min=0)
        self.rotation = rotations[self.positions]
        self.slots = torch.arange(len(positions), device=positions.device)
        self.live = live
        self.mask = self.make_mask()

    def make_mask(self) -> Any:
        reach = torch.arange(self.live, device=self.positions.device) <= self.positions[:, None]
        return reach[:, None, None]

    def attend(self, queries: Tensor, kv: Tensor, cache: Tensor) -> Tensor:
        before = cache[:, self.slots, :, self.positions]  # (n, 2, n_kv_heads, head_dim)
        cache[:, self.slots, :, self.positions] = torch.where(self.active, kv, before)
        keys, values = cache[:, : len(queries), :, : self.live]
        # The heads that share a key head become the rows of one query.
        folded = queries.reshape(len(queries), keys.shape[1], -1, queries.shape[-1])
        return self.attention(folded, keys, values).view_as(queries)

    def attention(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask)


class FlexStep(StaticStep):
    """The same with flex attention, which reads only the live blocks of each slot."""

    def __init__(self, rotations: Tensor, positions: Tensor, live: int, group: int) -> None:
        """group: query heads per key head."""
        self.group = group
        super().__init__(rotations, positions, live)

    def make_mask(self) -> Any:
        reach, blocks = self.positions, -(-self.live // BLOCK)
        return BlockMask.from_kv_blocks(
            (reach // BLOCK + 1).int()[:, None, None],
            torch.arange(blocks, dtype=torch.int32, device=reach.device).repeat(len(reach), 1, 1, 1),
            BLOCK_SIZE=BLOCK,
            mask_mod=lambda slot, head, query, position: position <= reach[slot],
            seq_lengths=(self.group, self.live),
            **FORWARD_ONLY,
        )

    def attention(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if queries.device.type == "cpu":
            queries = queries * 1.0  # the CPU kernel accepts no views
        else:
            torch._dynamo.mark_static(queries, 0)  # otherwise no kernel that splits the positions is used
        return flex_attention(queries, keys, values, block_mask=self.mask)


class StaticRunner:
    """Decodes one token per request.

    flex: whether to use flex attention, whose CPU kernels are slow.
    """

    clears = True  # the mask hides what another request left behind only if it is finite

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.flex = model.device.type == "cuda"
        self.graphs = Graphs(model.device, self.run) if self.flex else None

    def close(self) -> None:
        """Release captured graphs."""
        if self.graphs:
            self.graphs.clear()

    def takes(self, work: Sequence[Work]) -> bool:
        return all(
            item.row.length == 1 and not item.reads_prompt and not item.request.images for item in work
        )

    def start(self, work: Sequence[Work], after: Pending | None) -> Pending:
        model, requests = self.model, {item.row.slot: item.request for item in work}
        positions = {item.row.slot: item.row.start for item in work}
        rows = power_of_two(
            max(requests) + 1, model.params.max_batch_size
        )  # to keep the number of shapes small
        with (
            lost_rank_as_error(model.parallel),
            torch.inference_mode(),
            torch.cuda.device_of(model.norm.weight),
        ):
            if isinstance(after, StaticPending):
                tokens = after.tokens
            else:
                last = [requests[i].tokens[-1] if i in requests else 0 for i in range(rows)]
                tokens = to_device(last, model.device)
            where = to_device([positions.get(slot, -1) for slot in range(rows)], model.device)
            logits = self.logits(tokens, where, max(positions.values()))
            if any(r.params.adjusts or r.params.top_logprobs or r.constraint for r in requests.values()):
                chosen = choose_next(model, list(requests.values()), logits[list(requests)])
                return Done(work, list(chosen.values()))
            return StaticPending(model, work, logits, ahead_of=int(isinstance(after, StaticPending)))

    @torch.inference_mode()
    def logits(self, tokens: Tensor, positions: Tensor, reach: int) -> Tensor:
        """Logits, fp32 (n, vocab_size), after one token in each of the first n slots.

        tokens: int64 (n).
        positions: int64 (n), -1 for slots without a token, whose logits are meaningless.
        reach: the largest position.
        """
        self.model.cache.mark_written()
        if self.flex:
            try:
                return self._replay(tokens, positions, self.model.params.max_seq_len)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError | dist.DistError) or "gloo" in str(error):
                    raise  # not flex attention's fault
                reason = str(error).partition("\n")[0]
                warnings.warn(f"flex attention failed, decoding without it: {reason}", stacklevel=2)
                self.flex = False
                self.close()
        live = power_of_two(max(reach + 1, BLOCK), self.model.params.max_seq_len)
        return self._replay(tokens, positions, live)

    def _replay(self, tokens: Tensor, positions: Tensor, live: int) -> Tensor:
        return (self.graphs.replay if self.graphs else self.run)(tokens, positions, live)

    def run(self, tokens: Tensor, positions: Tensor, live: int) -> Tensor:
        model = self.model
        if self.flex:
            group = model.params.n_heads // model.parallel.size // model.cache.data.shape[3]
            step: StaticStep = FlexStep(model.rotations, positions, live, group)
        else:
            step = StaticStep(model.rotations, positions, live)
        return model.logits(model.run(tokens, step))


class StaticPending:
    """A step that the device may still be computing. Rows are slots.

    tokens: int64 (n), the input of the next step.
    """

    ahead = True

    def __init__(self, model: Transformer, work: Sequence[Work], logits: Tensor, ahead_of: int) -> None:
        """Choose the tokens, without waiting for the device.

        logits: fp32 (n, vocab_size). ahead_of: how many tokens of each request are still pending.
        """
        self.model, self.work, self.logits = model, work, logits
        n, vocab_size = logits.shape
        device = logits.device
        self.draws = draws_of({item.row.slot: item.request for item in work}, n, ahead_of)
        chosen, again = choose(logits, columns(self.draws, vocab_size, device))
        logprobs = torch.zeros(n, dtype=torch.float32, device=device)
        if any(item.request.params.logprobs for item in work):
            logprobs = token_logprobs(logits, chosen.clamp(min=0))
        result = torch.stack((chosen.float(), again.float(), logprobs))
        model.parallel.broadcast(result)  # kernels may differ between ranks, but tokens must not
        self.tokens = result[0].long().clamp(min=0)
        self.ready = None
        if device.type == "cuda":
            result = torch.empty_like(result, device="cpu", pin_memory=True).copy_(result, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()
        self.result = result
        self.outcomes: list[Outcome] = []

    def wait(self) -> Sequence[Outcome]:
        if not self.outcomes:
            if self.ready:
                self.ready.synchronize()
            tokens, again, logprobs = self.result.tolist()
            slots = [item.row.slot for item in self.work]
            self.outcomes = [
                self._look_again(slot, tokens[slot])
                if again[slot]
                else Outcome(int(tokens[slot]), logprobs[slot])
                for slot in slots
            ]
        return self.outcomes

    def _look_again(self, slot: int, before: float) -> Outcome:
        """The token of a slot whose nucleus exceeds the shortcut."""
        model, logits = self.model, self.logits[slot : slot + 1]
        with lost_rank_as_error(model.parallel), torch.inference_mode():
            everything = columns(
                self.draws[slot : slot + 1], logits.shape[-1], logits.device, everything=True
            )
            token = model.parallel.broadcast(choose(logits, everything)[0])
            logprob = token_logprobs(logits, token).item()
        return Outcome(int(token.item()), logprob, restart=token.item() != before)


def draws_of(requests: Mapping[int, Request], n: int, ahead: int) -> list[tuple[SamplingParams, int]]:
    """For `columns`: the parameters of the first n slots, and how many tokens they have drawn already.

    ahead: how many of these are still pending.
    """
    idle = replace(next(iter(requests.values())).params, temperature=0.0)
    return [
        (requests[slot].params, len(requests[slot].tokens) + ahead) if slot in requests else (idle, 0)
        for slot in range(n)
    ]


def compile_blocks(model: Transformer) -> None:
    """Compile the model's blocks, once for all layers, and the output layer.

    A ragged step's attention is not compiled; prefill runs compiled parts around it.
    """
    # Each kind of step needs a variant, on CUDA per number of slots, and all models share the limit.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    # Not compiled: lengths differ in every ragged step, and packed tensors are unknown to the compiler. As
    # decorators, these would import it with every model, which takes more than a second.
    for owner, name in ((RaggedStep, "attend"), (Packed, "__call__"), (Packed, "fused")):
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
    for module in (*model.layers, model.output):
        module.compile(dynamic=True)


def check_compile(compile: bool | str, device: torch.device) -> bool:
    """Whether to compile for a device. Raises ArgumentError unless it is "auto", True or False."""
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
