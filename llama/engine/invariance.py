"""Whether this machine's kernels give a row the same bits wherever it stands in a batch."""

import torch

from llama.errors import ArgumentError
from llama.model import Row, Transformer
from llama.parallel import lost_rank_as_error


def check_batch_invariance(model: Transformer, width: int) -> None:
    """Try whether a row's bits depend on its place in a batch padded to `width`, or on its company.

    Raises ValueError where they do: then no fixed shape makes a request's results independent.
    """
    n, vocab_size = model.params.max_batch_size, model.params.vocab_size
    rows = [Row(slot, 0, 1) for slot in range(n)]
    same = torch.zeros(width, dtype=torch.int64)
    mixed = torch.arange(width) * 7919 % vocab_size
    model.cache_owner = None
    with lost_rank_as_error(model.parallel):
        alike, beside = (model.logits(model.hidden(x.to(model.device), rows)) for x in (same, mixed))
        fits = bool((alike == alike[0]).all() and (beside[0] == alike[0]).all())
        worst = model.parallel.broadcast(torch.tensor([fits], device=model.device))
    if not worst.item():
        raise ArgumentError(
            f"batch_invariant=True cannot be kept here: on {model.device} in {str(model.dtype)[6:]}, with "
            f"{model.parallel.size} rank(s) and max_batch_size={n}, a row's logits change with its place in "
            "the batch; try another max_batch_size or dtype, fewer ranks, or build without it"
        )
