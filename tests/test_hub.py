"""Repositories of the Hugging Face hub, by its own package, from a hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama.checkpoint.hub import is_repository
from llama.cli.info import inspect
from tests.support import ROOT, formats, tiny
from tests.support.hub_server import HubServer

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
SCRIPT = """
import json, sys
from llama.checkpoint.hub import fetch_repository
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(fetch_repository(name))))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def server(tmp_path: Path):
    server = HubServer(tmp_path / "hub")
    yield server
    server.close()


def test_what_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_repository("org/name-1.5")
    for path in ("name", "here/typo", "./org/name", "org/name/file", "/org/name", "../name", "https://a/b"):
        assert not is_repository(path), path


@pytest.mark.slow
def test_repositories_are_fetched(server: HubServer, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    both = server.root / "org" / "both"
    formats.write_hf(both, PARAMS, formats.random_weights(PARAMS, 400))
    formats.hf_tokenizer(both)
    tiny.write_checkpoint(both / "original")
    tiny.write_checkpoint(server.root / "org" / "meta" / "original", 2)
    (server.root / "org" / "empty").mkdir()
    server.gated.add("org/gated")
    names = ["org/both", "org/meta", "org/both", "org/empty", "org/gated", "org/missing"]
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}

    def fetch(*names: str, **more: str) -> list:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *names],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **environment, **more},
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    found, meta, again, *refused = fetch(*names)
    assert found == again
    assert not (Path(found) / "original").exists()
    assert inspect(found)["format"] == "Hugging Face"
    assert inspect(meta)["files"] == 2
    assert sum("model.safetensors" in request for request in server.requests) == 2  # HEAD and GET
    kinds = [kind for kind, _ in refused]
    assert kinds == ["FileNotFoundError", "PermissionError", "FileNotFoundError"]
    assert refused[0][1].endswith("has neither *.safetensors nor original/consolidated.*.pth")
    assert "org/gated is gated: ask for access at https://huggingface.co/org/gated" in refused[1][1]
    assert "no folder org/missing here, and no such repository" in refused[2][1]
    server.close()
    # What is in the cache needs no network.
    assert fetch("org/both", HF_HUB_OFFLINE="1") == [found]
