"""One tiny model and one server of it, for all tests that leave both as they were."""

from pathlib import Path

import pytest
import trustme

from llama import Llama
from tests.support.serving import Served, serving, tiny_llama


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of an authority that signs nothing here."""
    trustme.CA().cert_pem.write_to_path(path := tmp_path_factory.mktemp("tls") / "ca.pem")
    return path


@pytest.fixture(autouse=True)
def _one_authority(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients read every certificate they trust, even for http: one rather than all of the web's."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_llama(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served(llama: Llama):
    with serving(llama) as served:
        yield served
        assert not served.busy


@pytest.fixture
def url(served: Served) -> str:
    return served.url
