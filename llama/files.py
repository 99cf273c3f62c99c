"""What the configuration files of a checkpoint may contain: JSON of known types, within limits.

Such files come from strangers. Nothing in them is used before its type is checked, and their text is
printed only by `repr`, which leaves no control characters in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama.errors import ArgumentError, CheckpointError, shown

LARGEST = 2**28  # bytes: ten times the tokenizer.json of the largest vocabularies

# What each type is called in errors. A whole number is also a number; true is neither.
WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def read_text(path: Path) -> str:
    """A file's text. Raises CheckpointError if it is implausibly large or not UTF-8."""
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
    text = read_text(path)
    try:
        content = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{path} nests lists or objects too deeply; download it again") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None
    if re.search(r"\\u[dD]", text) and not _encodes(content):
        raise CheckpointError(f"{path} contains an unpaired surrogate; download it again")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return content


def _encodes(content: object) -> bool:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_kinds(where: Path | str, content: Mapping[str, Any], kinds: Mapping[str, Sequence[type]]) -> None:
    """Raise CheckpointError if a value has none of its key's types.

    where: the file, for the error message.
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


def id_list(where: Path | str, content: Mapping[str, Any], key: str) -> list[int]:
    """The value of a key that is one token id or a list of them, as a list; empty if missing or null."""
    value = content.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_kind(i, int) and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(f"{where}: {key} must be a token id or a list of them, not {shown(value)}")
    return ids


@contextmanager
def no_panic(what: str) -> Iterator[None]:
    """A context in which a Rust package's errors, including panics, become ArgumentErrors.

    A panic is a BaseException, which nobody expects from a bad file.
    """
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise ArgumentError(f"{what}: {error}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ArgumentError(f"{what}: {error}") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
