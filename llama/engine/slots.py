"""The sequences in the KV cache: who owns them, what other requests may reuse, who wrote to them."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from llama.engine.edits import NOT_LOADED, edited, versions
from llama.engine.request import Request
from llama.model import Transformer
from llama.vision import VisionTransformer


@dataclass
class Slot:
    """One sequence's place in the KV cache."""

    index: int
    tokens: list[int] = field(default_factory=list)  # those with keys and values in the cache
    keys: Sequence[tuple[int, Hashable]] = ()  # what else these depend on; see `Request.prefix_keys`
    committed: int = 0  # how many of the tokens other requests may reuse
    reach: int = 0  # positions that may have been written to
    request: Request | None = None
    used: int = 0  # the last step that used it

    @property
    def free(self) -> bool:
        return self.request is None or self.request.finish_reason is not None


class Slots:
    """All slots of a model's cache.

    reusable: how many of a request's first n positions any other request may reuse.
    clears: whether to clear what a slot's last request left behind.
    """

    def __init__(self, model: Transformer, reusable: Callable[[Request, int], int], clears: bool) -> None:
        self.model, self.reusable, self.clears = model, reusable, clears
        self.all = [Slot(index) for index in range(model.params.max_batch_size)]
        self.epoch: int | None = None  # the cache's, after this engine's last write; None: forget
        self.weights = (0, NOT_LOADED)

    def running(self) -> list[Request]:
        """The requests that have a slot, in the order of the slots."""
        return [slot.request for slot in self.all if slot.request and not slot.free]

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A context whose cache writes count as this engine's own."""
        try:
            yield
        finally:
            self.epoch = self.model.cache.epoch

    def reclaim(self, look_at_weights: bool) -> bool:
        """Forget all keys and values if other code wrote to cache or weights. Returns whether it did."""
        weights = versions(self.model) if look_at_weights else self.weights
        changed = edited(self.weights, weights)
        if self.epoch == self.model.cache.epoch and not changed:
            self.weights = weights
            return False
        for slot in self.all:
            slot.committed, slot.reach, slot.tokens = 0, 0, []
        if isinstance(self.model, VisionTransformer) and (self.epoch is None or changed):
            self.model.forget_images()
        with self.writing():
            if self.clears:
                self.model.cache.data.zero_()
        self.weights = weights
        return True

    def admit(self, request: Request) -> bool:
        """Assign a free slot to a request, with the longest prefix any slot has; False if none is free.

        A slot whose tokens are all part of the prompt is continued. Otherwise the prefix is copied to
        the least recently used free slot, so two chats with the same beginning do not evict each other.
        """
        if not (free := [slot for slot in self.all if slot.free]):
            return False
        reused, source = max(
            ((self._reusable(slot, request), slot) for slot in self.all), key=lambda found: found[0]
        )
        continues = reused and source.free and reused == len(source.tokens)
        slot = source if continues else min(free, key=lambda slot: slot.used)
        prefix = source.tokens[:reused]
        slot.committed, slot.tokens = 0, []  # until they are copied
        with self.writing():
            if slot is not source and reused:
                self.model.cache.copy(source.index, slot.index, reused)
            if self.clears:
                self.model.cache.clear(slot.index, reused, max(slot.reach, reused + 15))  # 15: see `copy`
        slot.keys, slot.tokens, slot.committed, slot.reach = request.prefix_keys, prefix, reused, reused
        request.slot, request.reused, slot.request = slot.index, reused, request
        return True

    def _reusable(self, slot: Slot, request: Request) -> int:
        """How many of a request's first tokens need not be computed if it reuses this slot."""
        if request.params.prompt_logprobs:
            return 0  # all logits are needed
        # The last token's logits are always needed.
        count = _common(slot.tokens[: slot.committed], request.prompt[:-1])
        same = _common(slot.keys, request.prefix_keys)
        differing = *slot.keys[same : same + 1], *request.prefix_keys[same : same + 1]
        return self.reusable(request, min(count, *(position for position, _ in differing), count))

    def release(self, request: Request) -> None:
        """Free the slot of a request that has ended; committed tokens stay for reuse."""
        for slot in self.all:
            if slot.request is request:
                slot.request = None
                del slot.tokens[slot.committed :]
        request.slot = None


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """The length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
