"""Checkpoints by URL: copied once to a local cache, verified, and safe for concurrent processes.

Buckets (gs://, az://, https:// of Azure) are listed and read by blobfile. Plain web servers cannot be
listed, so the files of the known formats are requested by name.

A copy is complete when `.complete` is next to it. Until then, one process at a time works on it, under a
lock that the system releases if the process dies; complete files are kept.

Nothing a server says becomes a path: only names in `SMALL_FILES` and valid names of weight files do.
Folders in the cache are private to the user, and links in them are not followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import stat
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from llama.checkpoint.source import WEIGHTS, listed_weights
from llama.device import cache_folder
from llama.errors import ArgumentError, CheckpointError
from llama.files import LARGEST

# What a folder may contain besides weights.
SMALL_FILES = (
    "params.json", "tokenizer.model", "checklist.chk", "format.json", "config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
    "model.safetensors.index.json", "adapter_config.json",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
SCHEMES = ("https", "http", "gs", "az")
MOST_SHARDS = 100  # shard numbers have two digits


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def check_url(url: str) -> None:
    """Raise ArgumentError for a URL that cannot be fetched. The error does not repeat its query."""
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ArgumentError(
            f"{scheme}:// is not supported: use one of {', '.join(f'{name}://' for name in SCHEMES)}, or "
            "download the folder first and pass its path"
        )
    if not re.fullmatch("[!-~]+", url):
        raise ArgumentError(
            f"the {scheme}:// URL contains a space or a non-ASCII character: encode it as %XX, a space as %20"
        )
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if not whole:
        raise ArgumentError(f"the {scheme}:// URL has no valid host and port: copy it again")


def fetch(url: str) -> Path:
    """The local copy of a remote checkpoint folder or file, downloaded if there is none.

    Raises ArgumentError for a URL that cannot be fetched, FileNotFoundError if there is nothing at the
    address, CheckpointError if files do not match the checklist or refer to files elsewhere, OSError
    if the network fails.
    """
    check_url(url)
    parts = urlsplit(url)
    base = urlunsplit(parts._replace(path=parts.path.rstrip("/")))
    name = re.sub(r"[^\w.-]", "_", parts.path.rstrip("/").rpartition("/")[2], flags=re.ASCII)[-100:]
    name = name.lstrip(".") or "checkpoint"
    # A link's signature changes from day to day, but its target does not.
    folder = cache_folder() / f"{name}-{hashlib.sha256(public(base).encode()).hexdigest()[:12]}"
    cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)
    whole = folder / ".complete"
    with locked(folder / ".lock"):
        check_links(folder)
        if not whole.is_file():
            single = name if _is_file(base) else None
            source = Web(base, single) if is_web(base) else Bucket(base, single)
            copy(source, folder)
            whole.write_text("file" if single else "folder", "utf-8")
    return folder / name if whole.read_text("utf-8") == "file" else folder


def check_private(folder: Path) -> None:
    """Make a folder private. Raises CheckpointError if it is a link or another user's folder."""
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise CheckpointError(
            f"{folder} is a link or belongs to another user: set LLAMA_CACHE to a folder of your own"
        )
    folder.chmod(0o700)


def check_links(folder: Path) -> None:
    """Raise CheckpointError if anything in a cache folder is not a regular file."""
    for entry in os.scandir(folder):
        if not entry.is_file(follow_symlinks=False):
            raise CheckpointError(f"{entry.path} is not a regular file: remove {folder} to download it again")


def is_web(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") and not parts.netloc.endswith(".blob.core.windows.net")


def public(url: str) -> str:
    """A URL without its secrets: query, user and password."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _is_file(url: str) -> bool:
    return re.search(r"\.(gguf|model|json)$", urlsplit(url).path) is not None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A context that only one process at a time can enter."""
    import fcntl  # Unix only

    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that is downloading to {path.parent}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Web:
    """Files on a web server, with the names of the known formats.

    single: the local name, if the address is that of a single file.
    """

    def __init__(self, base: str, single: str | None) -> None:
        self.base, self.single = base, single

    def names(self, folder: Path) -> Iterator[str]:
        """The names of files to copy; earlier ones are already there, so that indexes can be read."""
        if self.single:
            yield self.single
            return
        yield from SMALL_FILES
        try:
            listed = {*listed_weights(folder / INDEX).values()} if (folder / INDEX).is_file() else set()
        except CheckpointError:
            (folder / INDEX).unlink()  # so that a later try downloads it again
            raise
        listed |= {name for name in checklist(folder) if WEIGHTS.fullmatch(name)}
        if listed:
            yield from sorted(listed)
        elif (folder / "adapter_config.json").is_file():
            yield "adapter_model.safetensors"
        elif (folder / "config.json").is_file():
            yield "model.safetensors"
        else:
            for number in range(MOST_SHARDS):
                yield f"consolidated.{number:02d}.pth"
                if not (folder / f"consolidated.{number:02d}.pth").is_file():
                    break

    def open(self, name: str) -> tuple[BinaryIO, int | None] | None:
        parts = urlsplit(self.base)
        path = parts.path if self.single else f"{parts.path}/{name}"
        address = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        try:
            response: Any = urllib.request.build_opener(Redirects).open(address, timeout=60)
        except urllib.error.HTTPError as error:
            if error.code in (403, 404, 410):
                return None
            raise OSError(f"{public(address)} answered {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            raise OSError(f"{public(address)} cannot be reached: {error.reason}") from None
        except http.client.HTTPException as error:
            raise OSError(f"{public(address)} does not speak HTTP: {type(error).__name__}") from None
        return response, response.length


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        target = urlsplit(newurl).scheme
        if target not in ("http", "https") or (req.type, target) == ("https", "http"):
            raise urllib.error.URLError(f"it redirects to {target}://, which is not supported")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Bucket:
    """Files in a storage bucket, read with blobfile."""

    def __init__(self, base: str, single: str | None) -> None:
        self.base, self.single = base, single

    def names(self, folder: Path) -> Iterator[str]:
        import blobfile

        if self.single:
            yield self.single
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
    """Copy all files of a source, each under its name only when complete, and check them."""
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
        part.unlink(missing_ok=True)
        most = None if WEIGHTS.fullmatch(name) else LARGEST
        quiet = True if int(os.environ.get("LOCAL_RANK", 0)) else None
        with (
            stream,
            part.open("xb") as file,
            tqdm.wrapattr(stream, "read", total=size, desc=name, leave=False, disable=quiet) as reader,
        ):
            try:
                while block := reader.read(2**20):
                    file.write(block)
                    if most is not None and file.tell() > most:
                        raise CheckpointError(f"{public(source.base)}: {name} is larger than {most:,} bytes")
            except http.client.HTTPException:
                size = size if size is not None else -1  # cut off in the middle of a chunk
        if size is not None and part.stat().st_size != size:
            raise OSError(
                f"{public(source.base)}: {name} was cut off after {part.stat().st_size:,} bytes; try again"
            )
        expected = checklist(folder).get(name)
        if expected is not None and md5(part) != expected:
            part.unlink()
            raise CheckpointError(
                f"{public(source.base)}: checksum of {name} does not match checklist.chk; try again"
            )
        part.rename(target)
        found += 1
    if missing := [name for name in checklist(folder) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{public(source.base)} lacks {', '.join(missing)}, which checklist.chk lists"
        )
    if not found or not any(WEIGHTS.fullmatch(path.name) or source.single for path in folder.iterdir()):
        raise FileNotFoundError(
            f"no checkpoint at {public(source.base)}: no weights were found there, or the link has expired"
        )


def checklist(folder: Path) -> dict[str, str]:
    """MD5 sums by file name, from a folder's checklist.chk."""
    path = folder / "checklist.chk"
    if not path.is_file():
        return {}
    lines = (line.split() for line in path.read_text("utf-8", errors="replace").splitlines())
    sums = {Path(line[1]).name: line[0].lower() for line in lines if len(line) == 2}
    return {name: sum for name, sum in sums.items() if name in SMALL_FILES or WEIGHTS.fullmatch(name)}


def md5(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
