"""Notices that weights were edited, so that nothing computed with the old ones is reused."""

from llama.model import Transformer

NOT_LOADED = hash(())
Versions = tuple[int, int]  # of the text model's weights, and of an image encoder's


def versions(model: Transformer) -> Versions:
    """Numbers that change when weights are replaced or edited in place, except through `.data` or NumPy."""
    found: tuple[list[tuple[int, int]], ...] = ([], [])
    for name, w in model.named_parameters():
        version = 0 if w.is_inference() else w._version
        found[name.startswith("vision_model.")].append((w.data_ptr(), version))
    return hash(tuple(found[0])), hash(tuple(found[1]))


def edited(before: Versions, after: Versions) -> bool:
    """Whether weights were edited in between. That an image encoder loads is no edit."""
    return before[0] != after[0] or before[1] not in (NOT_LOADED, after[1])
