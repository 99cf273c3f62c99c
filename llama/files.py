"""What the configuration files of a checkpoint may hold: JSON of known types, within limits.

Such files come from strangers. Nothing in them is used before its type has been looked at, and no
text of theirs is printed but by `repr`, which leaves no control character in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama.errors import CheckpointError

LARGEST = 2**28  # bytes: tokenizer.json of the largest vocabularies is a tenth of it

# The word for a kind of value. A whole number is a number too; true is neither.
WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def read_text(path: Path) -> str:
    """A file's text. Raises CheckpointError for one that is larger than its kind ever is, or not UTF-8."""
    if (size := path.stat().st_size) > LARGEST:
        raise CheckpointError(f"{path} has {size:,} bytes, more than {LARGEST:,}; download it again")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}); download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else; a missing file counts as an empty object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise CheckpointError(f"{path} nests lists or objects too deeply; download it again") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return content


def check_kinds(where: Path | str, content: Mapping[str, Any], kinds: Mapping[str, Sequence[type]]) -> None:
    """Raise CheckpointError if a value is of none of its key's kinds.

    where: the file, for the error.
    content: the object; a missing key and null pass.
    kinds: key to types, each one of `WORDS`.
    """
    for key, types in kinds.items():
        value = content.get(key)
        if value is not None and not any(is_kind(value, kind) for kind in types):
            wanted = " or ".join(WORDS[kind] for kind in types)
            raise CheckpointError(f"{where}: {key} must be {wanted}, not {shown(value)}")


def is_kind(value: object, kind: type) -> bool:
    """Whether a value is of one of the types of `WORDS`."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def shown(value: object) -> str:
    """A value for an error: its beginning, without control characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
