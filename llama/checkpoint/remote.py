"""Checkpoints by URL: copied once into a local cache, verified, safely for many processes at a time.

Buckets (gs://, az://, https:// of Azure) are listed and read by blobfile. Plain web servers cannot be
listed, so there the files of the known formats are asked for by name.

A copy is whole when `.complete` lies beside it. Until then one process at a time works on it, under a
lock that the system takes back should the process die; files already whole are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from llama.errors import CheckpointError

# What may lie in a folder beside its weights.
SMALL_FILES = (
    "params.json", "tokenizer.model", "checklist.chk", "format.json", "config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
    "model.safetensors.index.json", "adapter_config.json",
)  # fmt: skip
WEIGHTS = re.compile(r"consolidated\.\d+\.pth|.*\.safetensors|.*\.gguf|(pytorch|adapter)_model.*\.bin")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return re.match(r"[a-z0-9]+://", str(path)) is not None


def cache_folder() -> Path:
    """Where copies are kept: $LLAMA_CACHE, else ~/.cache/llama."""
    return Path(os.environ.get("LLAMA_CACHE") or Path.home() / ".cache" / "llama")


def fetch(url: str) -> Path:
    """The local copy of a remote checkpoint folder or file, made now where there is none.

    Raises FileNotFoundError where there is nothing at the address, CheckpointError where what came
    is not what the checklist says, OSError where the network fails.
    """
    parts = urlsplit(url)
    base = urlunsplit(parts._replace(path=parts.path.rstrip("/")))
    name = urlsplit(base).path.rpartition("/")[2] or "checkpoint"
    # The signature of a link changes from day to day, and what it leads to does not.
    folder = cache_folder() / f"{name}-{hashlib.sha256(public(base).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / ".complete"
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not whole.is_file():
            single = _is_file(base)
            source = Web(base, single) if is_web(base) else Bucket(base, single)
            copy(source, folder)
            whole.write_text("file" if single else "folder", "utf-8")
    return folder / name if whole.read_text("utf-8") == "file" else folder


def is_web(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") and not parts.netloc.endswith(".blob.core.windows.net")


def public(url: str) -> str:
    """A URL without what must not be printed: query, user and password."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _is_file(url: str) -> bool:
    return re.search(r"\.(gguf|model|json)$", urlsplit(url).path) is not None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A block that one process at a time is in."""
    import fcntl  # of Unix

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that fills {path.with_suffix('')}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Web:
    """Files of a web server, by the names that the known formats have."""

    def __init__(self, base: str, single: bool) -> None:
        self.base, self.single = base, single

    def names(self, folder: Path) -> Iterator[str]:
        """Names of what is to be copied; those before have been, so that indexes can be read."""
        if self.single:
            yield urlsplit(self.base).path.rpartition("/")[2]
            return
        yield from SMALL_FILES
        listed: set[str] = set()
        for name in ("model.safetensors.index.json",):
            if (folder / name).is_file():
                listed |= {*json.loads((folder / name).read_text("utf-8")).get("weight_map", {}).values()}
        listed |= {name for name in checklist(folder) if WEIGHTS.fullmatch(name)}
        if listed:
            yield from sorted(listed)
        elif (folder / "adapter_config.json").is_file():
            yield "adapter_model.safetensors"
        elif (folder / "config.json").is_file():
            yield "model.safetensors"
        else:
            number = 0
            while number == 0 or (folder / f"consolidated.{number - 1:02d}.pth").is_file():
                yield f"consolidated.{number:02d}.pth"
                number += 1

    def open(self, name: str) -> tuple[BinaryIO, int | None] | None:
        parts = urlsplit(self.base)
        path = parts.path if self.single else f"{parts.path}/{name}"
        address = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        try:
            response: Any = urllib.request.urlopen(address, timeout=60)
        except urllib.error.HTTPError as error:
            if error.code in (403, 404, 410):
                return None
            raise OSError(f"{public(address)} answered {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            raise OSError(f"{public(address)} cannot be reached: {error.reason}") from None
        length = response.headers.get("Content-Length")
        return response, None if length is None else int(length)


class Bucket:
    """Files of a storage bucket, by blobfile."""

    def __init__(self, base: str, single: bool) -> None:
        self.base, self.single = base, single

    def names(self, folder: Path) -> Iterator[str]:
        import blobfile

        if self.single:
            yield self.base.rpartition("/")[2]
            return
        for name in sorted(blobfile.listdir(self.base)):
            if name in SMALL_FILES or WEIGHTS.fullmatch(name):
                yield name

    def open(self, name: str) -> tuple[BinaryIO, int | None] | None:
        import blobfile

        address = self.base if self.single else f"{self.base}/{name}"
        try:
            size = blobfile.stat(address).size
        except FileNotFoundError:
            return None
        stream: Any = blobfile.BlobFile(address, "rb", streaming=True)
        return stream, size


def copy(source: Web | Bucket, folder: Path) -> None:
    """Copy all files of a source, each under its name when it is whole, and check them."""
    found = 0
    for name in source.names(folder):
        target = folder / name
        if target.is_file():
            found += 1
            continue
        opened = source.open(name)
        if opened is None:
            continue
        stream, size = opened
        part = folder / f"{name}.part"
        quiet = True if int(os.environ.get("LOCAL_RANK", 0)) else None
        with (
            stream,
            part.open("wb") as file,
            tqdm.wrapattr(stream, "read", total=size, desc=name, leave=False, disable=quiet) as reader,
        ):
            shutil.copyfileobj(reader, file, 2**20)
        if size is not None and part.stat().st_size != size:
            raise OSError(
                f"{public(source.base)}: {name} broke off after {part.stat().st_size:,} of {size:,} bytes; "
                "try again"
            )
        expected = checklist(folder).get(name)
        if expected is not None and md5(part) != expected:
            part.unlink()
            raise CheckpointError(f"{public(source.base)}: {name} is not what checklist.chk says; try again")
        part.rename(target)
        found += 1
    if missing := [name for name in checklist(folder) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{public(source.base)} lacks {', '.join(missing)}, which checklist.chk names"
        )
    if not found or not any(WEIGHTS.fullmatch(path.name) or source.single for path in folder.iterdir()):
        raise FileNotFoundError(
            f"no checkpoint at {public(source.base)}: no weights were found there, or the link has expired"
        )


def checklist(folder: Path) -> dict[str, str]:
    """MD5 sums by name, of a folder's checklist.chk."""
    path = folder / "checklist.chk"
    if not path.is_file():
        return {}
    lines = (line.split() for line in path.read_text("utf-8").splitlines())
    return {Path(line[1]).name: line[0] for line in lines if len(line) == 2}


def md5(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
