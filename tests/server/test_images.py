"""Images in every interface that takes them: by data URL, for a model that can see."""

import base64
import io
from pathlib import Path

import httpx
import openai
import pytest

from llama import Llama
from llama.tokenizer import Tokenizer
from tests.server.test_serve import two_ranks
from tests.support.serving import NAME, Served, serving
from tests.support.tiny import write_tokenizer
from tests.support.vision import picture, random_vision, write_checkpoint

GREEDY = {"temperature": 0, "max_tokens": 8}


def png(width: int, height: int, seed: int) -> bytes:
    picture(width, height, seed).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


WIDE, SMALL = png(112, 50, 0), png(40, 40, 2)


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    write_tokenizer(path := tmp_path_factory.mktemp("seeing") / "tokenizer.model")
    return Llama(random_vision(max_seq_len=160), Tokenizer(path))


@pytest.fixture(scope="module")
def eyes(seeing: Llama):
    with serving(seeing) as served:
        yield served
        assert not served.busy


@pytest.fixture
def client(eyes: Served):
    with openai.OpenAI(base_url=f"{eyes.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def dialog(*images: bytes) -> list:
    return [{"role": "user", "content": ["an", *({"type": "image", "image": i} for i in images), "er"]}]


def expected(seeing: Llama, *images: bytes) -> str:
    answer = seeing.chat_completion([dialog(*images)], temperature=0, max_gen_len=8)[0]
    return answer["generation"]["content"]


@pytest.mark.parametrize(
    "images", [pytest.param((WIDE,), marks=pytest.mark.slow), (SMALL, WIDE)], ids=["one", "two"]
)
def test_images_are_seen_as_by_the_library(seeing: Llama, eyes: Served, client, images: tuple) -> None:
    import anthropic

    text = expected(seeing, *images)
    assert text != expected(seeing, *images[:-1])
    urls = [{"type": "image_url", "image_url": {"url": data_url(i), "detail": "low"}} for i in images]
    parts = [{"type": "text", "text": "an"}, *urls, {"type": "text", "text": "er"}]
    chat = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": parts}], **GREEDY)
    assert chat.choices[0].message.content == text
    assert chat.usage.prompt_tokens == len(seeing.chat_requests([dialog(*images)])[0].prompt)
    urls = [{"type": "input_image", "image_url": data_url(i)} for i in images]
    parts = [{"type": "input_text", "text": "an"}, *urls, {"type": "input_text", "text": "er"}]
    reply = client.responses.create(
        model=NAME, input=[{"role": "user", "content": parts}], temperature=0, max_output_tokens=8
    )
    assert reply.output_text == text
    blocks = [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(i).decode()},
        }
        for i in images
    ]
    parts = [{"type": "text", "text": "an"}, *blocks, {"type": "text", "text": "er"}]
    with anthropic.Anthropic(base_url=eyes.url, api_key="none", max_retries=0) as other:
        message = other.messages.create(
            model=NAME,
            max_tokens=8,
            messages=[{"role": "user", "content": parts}],
            extra_body={"temperature": 0},
        )
    assert "".join(block.text for block in message.content) == text


@pytest.mark.parametrize("shown", ["http://127.0.0.1:1/a.png", "file:///etc/passwd", "/etc/passwd", ""])
def test_nothing_is_fetched(eyes: Served, tmp_path: Path, shown: str) -> None:
    asks = {
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": shown}}]}]
        },
        "/v1/responses": {
            "input": [{"role": "user", "content": [{"type": "input_image", "image_url": shown}]}]
        },
        "/v1/messages": {
            "max_tokens": 1,
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": shown}}]}
            ],
        },
    }
    for path, ask in asks.items():
        reply = httpx.post(eyes.url + path, json={"model": NAME, **ask})
        assert reply.status_code == 400
        assert "nothing is fetched" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,AAAA", "cannot be opened"),
        ("data:image/png;base64,*", "not valid base64"),
        ("data:text/html,hello", "must begin with data:image"),
        (data_url(WIDE[:200]), "may be damaged"),
    ],
)
def test_bad_images_are_refused(client: openai.OpenAI, url: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
        )


def test_too_many_images_are_refused(client: openai.OpenAI) -> None:
    five = 5 * [{"type": "image_url", "image_url": {"url": data_url(SMALL)}}]
    with pytest.raises(openai.BadRequestError, match="5 images, but max_images=4"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": five}])


def test_a_model_that_cannot_see_says_so(url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(SMALL)}}
    ask = {"model": NAME, "messages": [{"role": "user", "content": [part]}]}
    reply = httpx.post(f"{url}/v1/chat/completions", json=ask)
    assert (reply.status_code, "this model reads text only" in reply.text) == (400, True)


def test_embeddings_of_a_model_that_sees(seeing: Llama, client: openai.OpenAI) -> None:
    reply = client.embeddings.create(model=NAME, input=["the llama"])
    assert reply.data[0].embedding == pytest.approx(seeing.embed(["the llama"])[0].tolist(), abs=1e-6)


@pytest.mark.slow
def test_two_ranks_see_what_one_does(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", random_vision())
    with Llama.build(folder, max_seq_len=160, dtype="float32", max_images=2) as llama:
        text = expected(llama, SMALL)
    part = {"type": "image_url", "image_url": {"url": data_url(SMALL)}}
    parts = [{"type": "text", "text": "an"}, part, {"type": "text", "text": "er"}]
    with two_ranks(tmp_path, folder, "--dtype", "float32", "--max_images", 2) as address:
        body = {"model": NAME, "messages": [{"role": "user", "content": parts}], **GREEDY}
        reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    assert reply["choices"][0]["message"]["content"] == text
