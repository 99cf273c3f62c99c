"""A loopback server with one model, and download.sh with each client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.download.script import MODEL, SHARD, Script
from tests.support.download_server import FakeLlamaServer


@pytest.fixture
def server() -> Iterator[FakeLlamaServer]:
    server = FakeLlamaServer()
    server.publish(MODEL)
    yield server
    server.close()


@pytest.fixture
def script(tmp_path: Path, server: FakeLlamaServer) -> Script:
    return Script(tmp_path, server, "curl", "md5sum")


@pytest.fixture(params=["curl", "wget"])
def both(request: pytest.FixtureRequest, tmp_path: Path, server: FakeLlamaServer) -> Script:
    """The script with only curl, and again with only wget."""
    return Script(tmp_path, server, request.param, "md5sum")


@pytest.fixture
def weights(server: FakeLlamaServer) -> bytes:
    return server.files[f"{MODEL}/{SHARD}"]
