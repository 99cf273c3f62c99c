"""What is written down of requests: keys and texts in no log unless asked for, and traces; and TLS."""

import json
import ssl
from pathlib import Path

import httpx
import pytest
import trustme
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llama import Llama
from llama.server.logs import JsonLines
from tests.server.test_faults import until
from tests.server.test_guarded import ASKS, texts
from tests.server.test_serve import process
from tests.support.serving import NAME, serving

KEYS = ("secret-one", "secret-two")
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,zebrazebra"}}
BAD = [  # body, which has something wrong behind the text
    {"model": "zebra"},
    {"model": "tiny", "messages": [{"role": "user", "content": "zebra"}], "max_tokens": "zebra"},
    {"model": "tiny", "messages": [{"role": "zebra", "content": "zebra"}]},
    {"model": "tiny", "messages": [{"role": "user", "content": 500 * "zebra"}]},
    {"model": "tiny", "messages": [{"role": "user", "content": ["zebra", IMAGE]}]},
    {"model": "tiny", "messages": [{"role": "user", "content": [IMAGE]}]},
    {"model": "tiny", "messages": [{"role": "user", "content": "zebra"}], "regex": "zebra("},
    {"model": "tiny", "messages": [{"role": "user", "content": "zebra"}], "zebra": 1},
]
GOOD = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "zebra"}],
    "max_tokens": 4,
    "temperature": 0,
}


def ask_everything(url: str, verify: ssl.SSLContext) -> None:
    """With and without a key, and with every mistake."""
    with httpx.Client(base_url=url, verify=verify, timeout=60) as client:
        for key in ("secret-none", *KEYS):
            headers = {"authorization": f"Bearer {key}", "x-request-id": key[-3:]}
            for stream in (False, True):
                reply = client.post("/v1/chat/completions", json={**GOOD, "stream": stream}, headers=headers)
                assert reply.status_code == (401 if key == "secret-none" else 200)
            for path in ASKS:
                for body in BAD:
                    assert client.post(path, json=body, headers=headers).status_code >= 400
            assert client.post("/v1/embeddings", json={"model": "tiny", "input": "zebra"}, headers=headers)
            assert client.post("/tokenize", json={"prompt": "zebra"}, headers=headers)
            assert client.get("/v1/models", params={"key": "secret-one"}, headers=headers)
            assert client.post("/v1/completions", content=b'{"zebra', headers=headers).status_code >= 400


@pytest.mark.slow
def test_tls_and_no_key_or_text_in_what_is_printed(ckpt: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    (tmp_path / "keys").write_text("\n".join(KEYS))
    flags = [
        "--dtype",
        "float32",
        "--api_key_file",
        tmp_path / "keys",
        "--ssl_certfile",
        tmp_path / "cert.pem",
    ]
    flags += ["--ssl_keyfile", tmp_path / "key.pem"]
    for more in ([], ["--log_prompts"]):
        with process("llama", "serve", ckpt, *flags, *more, scheme="https") as (server, url):
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                httpx.get(f"{url}/health")
            ask_everything(url, trusting)
            server.terminate()
            _, printed = server.communicate(timeout=60)
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        assert {line["request_id"] for line in lines if "request_id" in line} >= {"one", "two"}
        assert {line.get("status") for line in lines} >= {200, 400, 401}
        assert "secret" not in printed
        assert ("zebra" in printed) is bool(more)
    prompts = [line for line in lines if line["message"] == "prompt"]
    assert all("zebra" in line["text"] for line in prompts)
    assert prompts[0]["request_id"] == "one"
    assert [line["message"] for line in lines if line.get("request_id") == "two"].count("answer") == 2


def test_prompts_and_answers_are_logged_if_asked_for(llama: Llama, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "llama.server")

    def lines(path: str) -> list[dict[str, object]]:
        """Without what is written late of an earlier request."""
        every = [json.loads(JsonLines().format(record)) for record in caplog.records]
        return [line for line in every if line.get("path", path) == path]

    with serving(llama, log_prompts=True) as served:
        for path, body in ASKS.items():
            caplog.clear()
            reply = httpx.post(served.url + path, json={"model": NAME, "temperature": 0, **body})
            until(lambda path=path: len(lines(path)) == 3)
            found = lines(path)
            assert [line["message"] for line in found] == ["prompt", "answer", "request"]
            assert "a 🦙?" in found[0]["text"]
            assert found[1]["text"] == texts(path, reply.json())[0]


def test_requests_are_traced(llama: Llama) -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    name = "POST /v1/chat/completions"
    with serving(llama) as served:
        for stream in (False, True):
            spans.clear()
            httpx.post(
                f"{served.url}/v1/chat/completions",
                json={**ASKS["/v1/chat/completions"], "model": NAME, "stream": stream},
                headers={"traceparent": parent},
            )
            until(lambda: any(span.name == name for span in spans.get_finished_spans()))
            (span,) = [span for span in spans.get_finished_spans() if span.name == name]
            assert f"{span.context.trace_id:032x}" in parent
            assert span.attributes["gen_ai.request.model"] == NAME
            assert span.attributes["gen_ai.usage.output_tokens"] > 0
            assert span.attributes["gen_ai.usage.input_tokens"] > 10
            assert not any("🦙" in str(value) for value in span.attributes.values())
