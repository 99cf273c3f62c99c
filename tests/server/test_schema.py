"""The OpenAPI document: right for every request that it allows, and for those that it does not."""

import contextlib
from pathlib import Path

import httpx
import pytest

from llama import Guard
from tests.support.script import scripted
from tests.support.serving import NAME, serving, tiny_llama

EXAMPLES = 40  # of each operation


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_operation_keeps_to_the_document(tmp_path: Path, mode: str) -> None:
    """Requests that the document allows, and ones that it does not."""
    import hypothesis
    import schemathesis
    from hypothesis import HealthCheck
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    llama = tiny_llama(tmp_path, max_seq_len=512)
    failed: dict[str, BaseException] = {}
    with serving(llama, guard=Guard(scripted("safe"), version="3-8b")) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()

            @hypothesis.settings(
                max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[*HealthCheck]
            )
            @hypothesis.seed(0)
            @hypothesis.given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
            def keeps(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = NAME  # any other name is refused
                # A request may have the right form and ask for what cannot be: 400, but no field is to blame.
                reply = case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])
                if mode == "positive" and reply.status_code == 400:
                    assert not reply.json()["error"].get("param"), reply.text

            try:
                with contextlib.suppress(Unsatisfiable):  # there is nothing to get wrong
                    keeps()
            except (Exception, FailureGroup) as error:
                failed[operation.label] = error
        assert not served.busy
    assert not failed, "\n\n".join(f"{name}: {error}" for name, error in failed.items())


def test_errors_are_described_in_each_interfaces_shape(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            shape = operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"]
            expected = "AnthropicError" if path.startswith("/v1/messages") else "OpenAIError"
            assert shape == f"#/components/schemas/{expected}"
            assert "422" not in operation["responses"]
