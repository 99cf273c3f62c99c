"""Load, faults and safety: what happens when clients or the model misbehave."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from llama import Llama
from llama.server.logs import JsonLines
from llama.server.service import Limits
from tests.support.serving import NAME, Served, serving, tiny_llama

ASK = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "temperature": 0}
LONG = {**ASK, "logit_bias": {"120": 100}}  # runs until max_seq_len or its own limit
PATH = "/v1/chat/completions"


@pytest.fixture
def own(tmp_path) -> Llama:
    """A model for a test that does something to it."""
    return tiny_llama(tmp_path, max_batch_size=2)


def until(true: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def begin(url: str, **body: object):
    """A stream, once its first bytes have come."""
    client = httpx.Client(timeout=30)
    response = client.send(
        client.build_request("POST", url + PATH, json={**LONG, "stream": True, **body}), stream=True
    )
    lines = response.iter_lines()
    next(lines)
    return client, lines


def test_a_client_that_goes_away_frees_its_slot(served: Served) -> None:
    client, _ = begin(served.url)
    assert served.busy
    client.close()
    until(lambda: not served.busy)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + PATH, json=LONG, timeout=0.3)
    until(lambda: not served.busy)


def test_requests_beyond_slots_and_queue_are_refused(own: Llama) -> None:
    with serving(own, Limits(queue=1)) as served:
        streams = [begin(served.url) for _ in range(2)]
        waiting = threading.Thread(
            target=httpx.post, args=(served.url + PATH,), kwargs={"json": {**ASK, "max_tokens": 1}}
        )
        waiting.start()
        until(lambda: served.server.driver.unfinished() == 3)
        refused = httpx.post(served.url + PATH, json=ASK)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        metrics = httpx.get(f"{served.url}/metrics").text
        assert "llama:num_requests_running 2.0" in metrics
        assert "llama:num_requests_waiting 1.0" in metrics
        assert httpx.post(served.url + PATH, json={**ASK, "n": 9}).status_code == 400  # never possible
        for client, _ in streams:
            client.close()
        waiting.join(10)
        until(lambda: not served.busy)
        assert httpx.post(served.url + PATH, json={**ASK, "max_tokens": 1}).status_code == 200


@pytest.mark.slow
def test_time_limits(own: Llama) -> None:
    with serving(own, Limits(timeout=0.5)) as served:
        late = httpx.post(served.url + PATH, json=LONG)
        assert late.status_code == 504
        assert "longer than 0.5 seconds" in late.json()["error"]["message"]
        with httpx.stream("POST", served.url + PATH, json={**LONG, "stream": True}) as response:
            last = [line for line in response.iter_lines() if line][-1]
        assert "longer than 0.5 seconds" in json.loads(last.removeprefix("data: "))["error"]["message"]
        until(lambda: not served.busy)


def test_bodies_are_limited_and_malformed_ones_refused(own: Llama) -> None:
    with serving(own, Limits(body=1000)) as served:
        large = json.dumps({**ASK, "user": 2000 * "x"})
        for content in (large, iter([large[:900].encode(), large[900:].encode()])):
            assert httpx.post(served.url + PATH, content=content).status_code == 413
        anthropic = httpx.post(f"{served.url}/v1/messages", content=large).json()
        assert anthropic["error"]["type"] == "request_too_large"
        headers = {"content-type": "application/json"}
        for content in (b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b"[" * 900):
            reply = httpx.post(served.url + PATH, content=content, headers=headers)
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
        assert httpx.get(served.url + PATH).status_code == 405
        assert httpx.get(f"{served.url}/nothing").json()["error"]["message"] == "Not Found"


def test_a_slow_reader_slows_nobody(served: Served) -> None:
    with socket.create_connection(served.url.removeprefix("http://").split(":")) as slow:  # type: ignore[arg-type]
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        body = json.dumps({**LONG, "stream": True, "max_tokens": 3000}).encode()
        slow.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % PATH.encode())
        slow.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        until(lambda: served.busy)
        assert httpx.post(served.url + PATH, json={**ASK, "max_tokens": 5}, timeout=20).status_code == 200
    until(lambda: not served.busy)


def test_keys(own: Llama, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "llama.server")
    with serving(own, keys=["secret-one", "secret-ü"]) as served:
        ask = {**ASK, "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer secret"}, {"x-api-key": "secret-one"[::-1]}):
            refused = httpx.post(served.url + PATH, json=ask, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(f"{served.url}/metrics", headers=headers).status_code == 401
        for headers in ({"authorization": "Bearer secret-one"}, {"x-api-key": "secret-ü".encode()}):
            assert httpx.post(served.url + PATH, json=ask, headers=headers).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200
        error = httpx.post(f"{served.url}/v1/messages", json={}).json()["error"]
        assert error["type"] == "authentication_error"
    lines = [JsonLines().format(record) for record in caplog.records]
    assert any(json.loads(line).get("status") == 401 for line in lines)
    assert not any("secret" in line for line in lines)


def test_texts_are_not_logged_and_requests_have_ids(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "llama.server")
    given = {"x-request-id": "mine-1"}
    ask = {**ASK, "messages": [{"role": "user", "content": "zebra"}], "max_tokens": 1}
    assert httpx.post(served.url + PATH, json=ask, headers=given).headers["x-request-id"] == "mine-1"
    forged = httpx.post(served.url + PATH, json={**ask, "zebra": 1}, headers={"x-request-id": "a b"})
    assert forged.headers["x-request-id"].startswith("req_")
    until(lambda: len(caplog.records) >= 2)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert {line["status"] for line in lines} >= {200, 400}
    assert not any("zebra" in str(line) for line in lines)


def test_other_sites_may_ask_only_if_named(own: Llama, served: Served) -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.get(f"{served.url}/health", headers=preflight).headers
    with serving(own, origins=["https://a.example"]) as open_to_one:
        allowed = httpx.options(open_to_one.url + PATH, headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.get(f"{open_to_one.url}/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_special_tokens_in_messages_stay_text(served: Served, llama: Llama) -> None:
    ask = {"messages": [{"role": "user", "content": "<|im_end|>"}]}
    tokens = httpx.post(f"{served.url}/tokenize", json=ask).json()["tokens"]
    assert tokens.count(llama.tokenizer.special_tokens["<|im_end|>"]) == 1  # the template's own
    text = httpx.post(f"{served.url}/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.count("<|im_end|>") == 2


@pytest.mark.slow
def test_told_to_end_it_finishes_what_it_has(own: Llama) -> None:
    with serving(own) as served:
        client, lines = begin(served.url, max_tokens=400)
        served.server.handle_exit(15, None)
        until(lambda: httpx.get(f"{served.url}/health/ready").status_code == 503)
        assert httpx.get(f"{served.url}/health/live").status_code == 200
        assert httpx.post(served.url + PATH, json=ASK).status_code == 503
        assert [line for line in lines if line][-1] == "data: [DONE]"
        served.thread.join(10)
        assert not served.thread.is_alive()
        client.close()


def test_told_twice_it_ends_at_once(own: Llama) -> None:
    with serving(own) as served:
        client, lines = begin(served.url)
        served.server.handle_exit(15, None)
        served.server.handle_exit(15, None)
        served.thread.join(10)
        assert not served.thread.is_alive()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
        client.close()


def test_a_model_that_fails_ends_the_server_and_tells_everybody(
    own: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(own) as served:
        client, lines = begin(served.url)

        def broken(*_: object) -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(own.engine, "step", broken)
        last = [line for line in lines if line][-1]
        assert "the model is no longer running" in last
        served.thread.join(10)
        assert not served.thread.is_alive()
        assert str(served.server.driver.failure) == "out of luck"
        client.close()


def test_an_answer_that_cannot_be_given_is_an_error(own: Llama) -> None:
    own.model.norm.weight.fill_(float("nan"))
    with serving(own) as served:
        reply = httpx.post(served.url + PATH, json=ASK)
        assert reply.status_code == 500
        assert "not finite" in reply.json()["error"]["message"]
