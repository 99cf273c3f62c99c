"""Checkpoints by URL, from a real server on loopback."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import re
import shutil
import socketserver
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import blobfile
import pytest
import torch

from llama import Llama
from llama.checkpoint import open_checkpoint, remote
from llama.errors import ArgumentError, CheckpointError
from tests.support import formats, gguf_files

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
PARAMS |= {"rope_theta": 500000.0, "vocab_size": 640}


class Server:
    """Serves a folder; counts what is asked for, and can break off."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.cut = folder, Counter[str](), ""
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                self.path = path = urlsplit(self.path).path
                server.asked[path.rpartition("/")[2]] += 1
                if server.cut and path.endswith(server.cut):
                    data = Path(self.translate_path(path)).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2])
                    return
                super().do_GET()

            def log_message(self, *_: Any) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "served")
    (tmp_path / "served").mkdir()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve_native(server: Server, shards: int = 2) -> Path:
    weights = formats.random_weights(PARAMS, 640)
    folder = formats.write_native(server.folder / "model", PARAMS, weights, formats.tiktoken_ranks(), shards)
    lines = (f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in folder.iterdir())
    (folder / "checklist.chk").write_text("".join(sorted(lines)))
    return folder


def build(path: str | Path, **options: Any) -> Llama:
    return Llama.build(path, max_seq_len=64, max_batch_size=1, dtype="float32", device="cpu", **options)


def same(one: Llama, other: Llama) -> bool:
    tokens = torch.arange(16)[None]
    return torch.equal(one.model.forward(tokens, 0), other.model.forward(tokens, 0))


@pytest.mark.parametrize("with_checklist", [True, False])
def test_native_folder_is_copied_once(with_checklist: bool, server: Server) -> None:
    folder = serve_native(server)
    if not with_checklist:
        (folder / "checklist.chk").unlink()
    first = build(f"{server.url}/model/?signature=1")
    asked = server.asked.copy()
    assert asked["consolidated.01.pth"] == 1
    second = build(f"{server.url}/model?signature=2")
    assert server.asked == asked
    assert same(first, second)
    assert same(first, build(folder))


def test_hugging_face_folder(server: Server) -> None:
    formats.write_hf(
        server.folder / "hf", PARAMS, formats.random_weights(PARAMS, 400), max_shard_size="100KB"
    )
    formats.hf_tokenizer(server.folder / "hf")
    assert same(build(f"{server.url}/hf"), build(server.folder / "hf"))


def test_single_files(server: Server) -> None:
    """A GGUF file, and a tokenizer for a local folder."""
    ranks = formats.tiktoken_ranks()
    weights = formats.random_weights(PARAMS, len(ranks) + 5)
    path = gguf_files.write_gguf(
        server.folder / "m.gguf", PARAMS, weights, gguf_files.byte_level_fields(ranks)
    )
    assert same(build(f"{server.url}/m.gguf"), build(path))
    folder = serve_native(server)
    url = f"{server.url}/model/tokenizer.model"
    assert same(build(folder, tokenizer_path=url), build(folder))


def test_broken_transfer_is_taken_up_again(server: Server, cache: Path) -> None:
    serve_native(server)
    server.cut = "consolidated.01.pth"
    with pytest.raises(OSError, match="was cut off"):
        open_checkpoint(f"{server.url}/model?Signature=secret")
    server.cut = ""
    open_checkpoint(f"{server.url}/model")
    assert server.asked["consolidated.00.pth"] == 1  # kept from the first time
    assert server.asked["consolidated.01.pth"] == 2
    assert not [*cache.glob("*/*.part")]


def test_damaged_file_is_refused(server: Server) -> None:
    folder = serve_native(server)
    shard = folder / "consolidated.01.pth"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(CheckpointError, match=r"checksum of consolidated\.01\.pth does not match"):
        open_checkpoint(f"{server.url}/model")
    shard.write_bytes(data)
    open_checkpoint(f"{server.url}/model")


def test_nothing_there(server: Server) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at") as error:
        open_checkpoint(f"{server.url}/nothing?Signature=secret")
    assert "secret" not in str(error.value)
    with pytest.raises(OSError, match="cannot be reached"):
        open_checkpoint("http://127.0.0.1:9/model")


def test_checklist_names_an_absent_file(server: Server) -> None:
    folder = serve_native(server)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks consolidated\.01\.pth"):
        open_checkpoint(f"{server.url}/model")


@pytest.mark.slow
def test_many_processes_at_once(server: Server) -> None:
    serve_native(server)
    code = "import sys; from llama.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1])"
    processes = [subprocess.Popen([sys.executable, "-c", code, f"{server.url}/model"]) for _ in range(4)]
    assert [process.wait(100) for process in processes] == [0] * 4
    assert server.asked["consolidated.00.pth"] == 1


def test_bucket_by_blobfile(tmp_path: Path) -> None:
    """The path that gs:// and az:// take, over the one kind of folder that blobfile reads offline."""
    folder = tmp_path / "bucket"
    formats.write_native(folder, PARAMS, formats.random_weights(PARAMS, 640), formats.tiktoken_ranks(), 2)
    (folder / "unrelated.txt").touch()
    copy = tmp_path / "copy"
    copy.mkdir()
    remote.copy(remote.Bucket(str(folder), single=None), copy)
    assert sorted(path.name for path in copy.iterdir()) == [
        "consolidated.00.pth",
        "consolidated.01.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert same(build(copy), build(folder))
    assert not remote.is_web("gs://bucket/model")
    assert not remote.is_web("https://account.blob.core.windows.net/container/model")
    assert blobfile.exists(str(folder))
    shutil.rmtree(copy)


# ---- A server that is not trusted ----------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["../../escaped.safetensors", "{}/escaped.safetensors", "escaped", ["x"], {}]
)
def test_names_from_an_index_stay_in_the_cache(
    server: Server, cache: Path, tmp_path: Path, file: Any
) -> None:
    formats.write_hf(server.folder / "hf", PARAMS, formats.random_weights(PARAMS, 400))
    (server.folder / "hf" / "model.safetensors").unlink()
    if isinstance(file, str):
        (tmp_path / "escaped.safetensors").unlink(missing_ok=True)
        file = file.format(tmp_path)
    index = server.folder / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(CheckpointError, match="not a valid name for a weight file"):
        open_checkpoint(f"{server.url}/hf")
    assert not [*tmp_path.rglob("escaped*")]
    assert not [*cache.glob("*/*.index.json")]  # so that a mended one is fetched


def test_a_checklist_names_nothing_elsewhere(server: Server) -> None:
    folder = serve_native(server)
    with (folder / "checklist.chk").open("a") as file:
        file.write(f"{'0' * 32}  ../../.bashrc\n{'0' * 32}  ..\n\xff\n")
    open_checkpoint(f"{server.url}/model")


def test_copies_are_private(server: Server, cache: Path) -> None:
    serve_native(server)
    open_checkpoint(f"{server.url}/model")
    folder = next(path for path in cache.iterdir() if path.is_dir())
    assert [path.stat().st_mode & 0o777 for path in (cache, folder)] == [0o700, 0o700]
    folder.chmod(0o777)
    open_checkpoint(f"{server.url}/model")
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json.part", ".lock", ".complete"])
def test_links_in_the_cache_are_not_followed(server: Server, cache: Path, tmp_path: Path, name: str) -> None:
    serve_native(server)
    open_checkpoint(f"{server.url}/model")
    folder = next(path for path in cache.iterdir() if path.is_dir())
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (folder / ".complete").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises((CheckpointError, OSError), match=name):
        open_checkpoint(f"{server.url}/model")
    assert outside.read_text() == "mine"


def test_a_linked_folder_is_refused(server: Server, cache: Path, tmp_path: Path) -> None:
    serve_native(server)
    open_checkpoint(f"{server.url}/model")
    folder = next(path for path in cache.iterdir() if path.is_dir())
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="is a link or belongs to another user"):
        open_checkpoint(f"{server.url}/model")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("s3://bucket/model", "s3:// is not supported: use one of https://"),
        ("file:///etc/passwd", "file:// is not supported"),
        ("FTP://host/model", "ftp:// is not supported"),
        ("https://host/my model?Signature=secret", "a space as %20"),
        ("https://host/mod\x1bel", "a space as %20"),
        ("https://host/mödel", "a space as %20"),
        ("https://host:port/model?Signature=secret", "no valid host and port"),
        ("https:///model", "no valid host and port"),
        ("https://[::1/model", "no valid host and port"),
    ],
)
def test_urls_that_cannot_be_fetched(url: str, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(sentence)) as error:
        open_checkpoint(url)
    assert "secret" not in str(error.value)


def answers(raw: bytes) -> Iterator[str]:
    """A server that says the same bytes to everybody."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(raw)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as tcp:
        threading.Thread(target=tcp.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{tcp.server_address[1]}/model"
        tcp.shutdown()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00\xff nonsense\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 70000 + b"\r\n\r\n",
        b"HTTP/1.1 999\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/hostname\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1/x\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://a b/\x01\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nshort",
    ],
)
def test_answers_that_are_no_answers(raw: bytes, cache: Path) -> None:
    for url in answers(raw):
        with pytest.raises(OSError, match=r"http://127.0.0.1|No connection|refused"):
            open_checkpoint(url)
        assert not list(cache.rglob("*.json"))


def test_a_length_that_is_no_number(cache: Path) -> None:
    for url in answers(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}"):
        with pytest.raises((OSError, CheckpointError)):
            open_checkpoint(url)


def test_small_files_are_small(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_native(server)
    monkeypatch.setattr(remote, "LARGEST", 10)
    with pytest.raises(CheckpointError, match=r"params.json is larger than 10 bytes"):
        open_checkpoint(f"{server.url}/model")
