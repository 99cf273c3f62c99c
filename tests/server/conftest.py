"""One tiny model and one server of it, for all tests that leave both as they were."""

import pytest

from llama import Llama
from tests.support.serving import Served, serving, tiny_llama


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
