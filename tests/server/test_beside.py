"""Embeddings and moderations, by OpenAI's client."""

import asyncio

import httpx
import openai
import pytest
import torch

from llama import Guard, Llama
from llama.server.service import Limits
from tests.server.test_faults import begin, until
from tests.support.script import scripted
from tests.support.serving import NAME, Served, serving, tiny_llama

TEXTS = ["the llama", "a", "🦙 ü", "the llama sleeps"]


@pytest.fixture
def client(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_embeddings_are_the_librarys(client: openai.OpenAI, url: str, llama: Llama) -> None:
    expected = llama.embed(TEXTS)
    reply = client.embeddings.create(model=NAME, input=TEXTS)  # the client asks for base64
    torch.testing.assert_close(torch.tensor([e.embedding for e in reply.data]), expected)
    assert [e.index for e in reply.data] == list(range(len(TEXTS)))
    ids = [llama.tokenizer.encode(text, bos=True, eos=False) for text in TEXTS]
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, ids))
    floats = client.embeddings.create(model=NAME, input=ids, encoding_format="float")
    assert [e.embedding for e in floats.data] == [e.embedding for e in reply.data]
    for one in ("the llama", ids[0]):
        (alone,) = client.embeddings.create(model=NAME, input=one).data
        assert alone.embedding == pytest.approx(reply.data[0].embedding, abs=1e-6)
    cls = client.embeddings.create(model=NAME, input=TEXTS, extra_body={"pooling": "cls"})
    torch.testing.assert_close(torch.tensor(cls.data[1].embedding), llama.embed(TEXTS, "cls")[1])
    raw = httpx.post(f"{url}/v1/embeddings", json={"model": NAME, "input": "a"}).json()
    assert isinstance(raw["data"][0]["embedding"][0], float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": []}, "input has 0 texts"),
        ({"input": [["a"]]}, "input"),
        ({"input": [9999]}, "9999 is not a token id"),
        ({"input": [-1]}, "-1 is not a token id"),
        ({"input": [[1], []]}, "text 1 has 0 tokens"),
        ({"input": 5000 * "x"}, "text 0 has 5001 tokens; it must have 1 to max_seq_len=4096"),
        ({"input": "a", "dimensions": 7}, "32 dimensions, not 7"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
    ids=str,
)
def test_bad_embeddings_are_refused(client: openai.OpenAI, options: dict, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.embeddings.create(**{"model": NAME, **options})


def test_answers_move_on_between_batches_of_embeddings(served: Served, llama: Llama) -> None:
    """And give-ups leave out what has not begun."""
    stream, lines = begin(served.url)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}/v1/embeddings", json={"model": NAME, "input": 2048 * ["x" * 900]}, timeout=0.4
        )
    for _ in range(20):
        assert next(lines) is not None
    stream.close()
    until(lambda: not served.busy)
    assert len(served.server.driver.call("embed", ["a"]).result(5)) == 1


@pytest.mark.slow
def test_embeddings_wait_in_a_bounded_queue(tmp_path) -> None:
    ask = {"model": NAME, "input": 200 * ["x" * 300]}

    async def flood(url: str) -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            replies = await asyncio.gather(*(client.post(f"{url}/v1/embeddings", json=ask) for _ in range(5)))
        return sorted(reply.status_code for reply in replies)

    with serving(tiny_llama(tmp_path, max_batch_size=1), Limits(queue=1)) as served:
        assert asyncio.run(flood(served.url)) == [200, 200, 429, 429, 429]


@pytest.mark.slow
@pytest.mark.parametrize("says", ["safe", "unsafe\nS2,S14"])
def test_moderations_are_the_guards(llama: Llama, says: str) -> None:
    guard = Guard(scripted(says), version="3-8b")
    with (
        serving(llama, guard=guard) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client,
    ):
        for given in ("How do I pick a lock?", ["a", "How do I pick a lock?"]):
            reply = client.moderations.create(input=given)
            assert len(reply.results) == (1 if isinstance(given, str) else 2)
            verdict = guard.check([{"role": "user", "content": "How do I pick a lock?"}])
            found = reply.results[-1].model_dump(by_alias=True)
            assert found["flagged"] is not verdict.safe
            named = {category.name for category in verdict.categories}
            categories = {k: v for k, v in found["categories"].items() if v is not None}
            assert categories == {name: name in named for name in categories}
            assert {"Violent Crimes", "Non-Violent Crimes", "Code Interpreter Abuse"} <= set(categories)
            scores = found["category_scores"]
            assert scores["Violent Crimes"] == 0
            if named:
                assert scores["Non-Violent Crimes"] == pytest.approx(verdict.unsafe_probability, abs=1e-6)
        parts = [{"type": "text", "text": "a"}]
        assert client.moderations.create(input=parts).results[0].flagged is (says != "safe")
        image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
        with pytest.raises(openai.BadRequestError, match="reads text only"):
            client.moderations.create(input=image)
        with pytest.raises(openai.BadRequestError, match="input has 0 entries"):
            client.moderations.create(input=[])


def test_without_a_guard_there_are_no_moderations(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no guard to moderate with: start it with --guard DIR"):
        client.moderations.create(input="a")
