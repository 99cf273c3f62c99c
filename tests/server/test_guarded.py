"""A guard before and behind every interface, on one rank and on two."""

import json
from pathlib import Path

import httpx
import pytest

from llama import Llama
from tests.server.test_faults import until
from tests.server.test_serve import two_ranks
from tests.support.script import save_scripted, scripted
from tests.support.serving import NAME, serving
from tests.test_guard import Words

GREEDY = {"model": NAME, "temperature": 0}
QUESTION = "a 🦙?"
MESSAGES = [{"role": "user", "content": QUESTION}]
ASKS = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 12},
    "/v1/completions": {"prompt": QUESTION, "max_tokens": 12},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 12},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 12},
}
BLOCKED = ("content_filter", "refusal")


def texts(path: str, reply: dict) -> tuple[str, str]:
    """The text of a reply, and why it ended."""
    if path == "/v1/chat/completions":
        return reply["choices"][0]["message"]["content"] or "", reply["choices"][0]["finish_reason"]
    if path == "/v1/completions":
        return reply["choices"][0]["text"], reply["choices"][0]["finish_reason"]
    if path == "/v1/responses":
        said = "".join(part["text"] for item in reply["output"] for part in item["content"])
        return said, (reply["incomplete_details"] or {}).get("reason", reply["status"])
    return "".join(block["text"] for block in reply["content"]), reply["stop_reason"]


def ask(url: str, path: str, **more: object) -> httpx.Response:
    return httpx.post(url + path, json={**GREEDY, **ASKS[path], **more}, timeout=30)


@pytest.fixture(scope="module", params=ASKS)
def alone(request: pytest.FixtureRequest, llama: Llama) -> tuple[str, str]:
    """An interface, and its answer without a guard."""
    with serving(llama) as served:
        said, reason = texts(request.param, ask(served.url, request.param).json())
    assert said and reason not in BLOCKED
    return request.param, said


def test_a_safe_exchange_is_left_alone(llama: Llama, alone: tuple[str, str]) -> None:
    path, said = alone
    guard = Words("zebra")
    with serving(llama, guard=guard) as served:
        assert texts(path, ask(served.url, path).json())[0] == said
        streamed = ask(served.url, path, stream=True).text
        assert json.dumps(said, ensure_ascii=False)[1:-1] in streamed or path != "/v1/responses"
    assert [len(dialog) for dialog in guard.seen] == [1, 2, 1, 2]
    assert [dialog[-1]["content"] for dialog in guard.seen] == [QUESTION, said, QUESTION, said]


def test_an_unsafe_question_reaches_no_model(llama: Llama, alone: tuple[str, str]) -> None:
    path, _ = alone
    with serving(llama, guard=Words("🦙")) as served:
        before = llama.engine.steps
        said, reason = texts(path, ask(served.url, path).json())
        assert (said, reason in BLOCKED) == ("", True)
        streamed = ask(served.url, path, stream=True)
        assert streamed.status_code == 200
        assert any(word in streamed.text for word in BLOCKED)
        assert llama.engine.steps == before
        assert 'finished_reason="content_filter"} 2.0' in httpx.get(f"{served.url}/metrics").text


def test_an_unsafe_answer_is_not_shown(llama: Llama, alone: tuple[str, str]) -> None:
    path, shown = alone
    bad = shown[-3:]
    with serving(llama, guard=Words(bad)) as served:
        said, reason = texts(path, ask(served.url, path).json())
        assert (said, reason in BLOCKED) == ("", True)
        streamed = ask(served.url, path, stream=True).text
        assert any(word in streamed for word in BLOCKED)
        assert shown[:4] not in streamed and json.dumps(shown[:4])[1:-1] not in streamed
        until(lambda: not served.busy)


@pytest.mark.slow
def test_a_guard_embeddings_and_moderations_on_two_ranks(ckpt: Path, tmp_path: Path) -> None:
    """They all give what one rank gives, at once with chats."""
    guards = {"safe": "safe", "unsafe": "unsafe\nS2,S10"}
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "the llama"}], "max_tokens": 16}
    ask["temperature"] = 0
    with Llama.build(ckpt, max_seq_len=256, dtype="float32") as llama:
        (expected,) = llama.chat_completion([ask["messages"]], temperature=0, max_gen_len=16)
        vectors = llama.embed(["the llama", "in"])
    for name, text in guards.items():
        guard = save_scripted(tmp_path / name, scripted(text))
        with two_ranks(tmp_path, ckpt, "--dtype", "float32", "--guard", guard) as url:
            reply = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60).json()["choices"][0]
            blocked = reply["finish_reason"] == "content_filter"
            assert blocked is (name == "unsafe")
            assert reply["message"]["content"] == ("" if blocked else expected["generation"]["content"])
            (result,) = httpx.post(f"{url}/v1/moderations", json={"input": "the"}, timeout=60).json()[
                "results"
            ]
            assert result["flagged"] is blocked
            assert [k for k, v in result["categories"].items() if v] == (
                ["Non-Violent Crimes", "Hate"] if blocked else []
            )
            body = {"model": "tiny", "input": ["the llama", "in"]}
            found = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).json()["data"]
            for one, vector in zip(found, vectors.tolist(), strict=True):
                assert one["embedding"] == pytest.approx(vector, abs=1e-5)
