"""Batch invariance: a request's results are bit-identical whatever runs alongside it."""

from collections.abc import Sequence

import torch

from llama.engine.request import Request, Work
from llama.engine.runners import Done, Pending, RaggedRunner
from llama.errors import ArgumentError
from llama.model import Row, Transformer
from llama.ranks import lost_rank_as_error


class InvariantRunner(RaggedRunner):
    """Runs every matrix product at a shape that depends on one request alone.

    A prompt chunk runs by itself; new tokens, however few, are padded to one row per slot.
    Raises ArgumentError if this machine's kernels make a row's bits depend on its position in the batch.
    """

    def __init__(self, model: Transformer, prefill_chunk: int) -> None:
        super().__init__(model, reread=1)
        self.chunk = prefill_chunk
        # Kernels work in blocks of rows; a power of two leaves no partial block at the end.
        self.width = 1 << (model.params.max_batch_size - 1).bit_length()
        check_batch_invariance(model, self.width)

    def reusable(self, request: Request, n: int) -> int:
        """Only whole chunks of a prompt are bit-identical in another request."""
        n = min(n, len(request.prompt))
        return n - n % self.chunk

    def start(self, work: Sequence[Work], after: Pending | None = None) -> Pending:
        decoding = [item for item in work if not item.reads_prompt]
        outcomes = (
            dict(zip(decoding, self.run(decoding, self.width, draw=1), strict=True)) if decoding else {}
        )
        for item in work:
            if item.reads_prompt:
                outcomes[item] = self.run([item], draw=1)[0]
        return Done(work, [outcomes[item] for item in work])


def check_batch_invariance(model: Transformer, width: int) -> None:
    """Test whether a row's bits depend on its position in a batch padded to `width`, or on other rows.

    Raises ArgumentError if they do: then no fixed shape makes a request's results independent.
    """
    n, vocab_size = model.params.max_batch_size, model.params.vocab_size
    rows = [Row(slot, 0, 1) for slot in range(n)]
    same = torch.zeros(width, dtype=torch.int64)
    mixed = torch.arange(width) * 7919 % vocab_size
    with lost_rank_as_error(model.parallel):
        alike, beside = (model.logits(model.hidden(x.to(model.device), rows)) for x in (same, mixed))
        fits = bool((alike == alike[0]).all() and (beside[0] == alike[0]).all())
        worst = model.parallel.broadcast(torch.tensor([fits], device=model.device))
    if not worst.item():
        raise ArgumentError(
            f"batch_invariant=True is not possible here: on {model.device} in {str(model.dtype)[6:]}, with "
            f"{model.parallel.size} rank(s) and max_batch_size={n}, a row's logits depend on its position in "
            "the batch; try another max_batch_size or dtype, fewer ranks, or build without it"
        )
