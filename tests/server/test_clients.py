"""Programs that other people wrote for servers like this one, unmodified, with the demo model."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.checkpoint.convert import convert
from tests.server.test_openai import CITY
from tests.support.serving import NAME, Served, serving

pytestmark = pytest.mark.soak
QUESTION = "What is the capital of France?"
DIALOG = [{"role": "user", "content": QUESTION}]
WEATHER = {"name": "weather", "description": "The weather.", "parameters": CITY}


@pytest.fixture(scope="module")
def demo(demo_ckpt: Path) -> Iterator[Llama]:
    with Llama.build(demo_ckpt, max_seq_len=1024, max_batch_size=4) as llama:
        yield llama


@pytest.fixture(scope="module")
def served_demo(demo: Llama) -> Iterator[Served]:
    demo.tool_format = "json"
    with serving(demo) as served:
        yield served
        assert not served.busy


@pytest.fixture
def url(served_demo: Served) -> str:
    return served_demo.url


@pytest.fixture(scope="module")
def expected(demo: Llama) -> str:
    """The greedy answer, by the library itself, before anybody serves the model."""
    (answer,) = demo.chat_completion([DIALOG], temperature=0, max_gen_len=40)
    return answer["generation"]["content"]


class TestLangChain:
    @pytest.fixture
    def chat(self, url: str):
        langchain = pytest.importorskip("langchain_openai")
        return langchain.ChatOpenAI(
            model=NAME, base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=40, max_retries=0
        )

    def test_invoke_stream_and_batch(self, expected: str, chat: Any) -> None:
        reply = chat.invoke(QUESTION)
        assert reply.content == expected
        assert reply.usage_metadata["total_tokens"] > 40
        assert reply.response_metadata["finish_reason"] in ("stop", "length")
        chunks = list(chat.stream(QUESTION))
        assert len(chunks) > 3
        assert "".join(chunk.content for chunk in chunks) == expected
        assert [reply.content for reply in chat.batch([QUESTION] * 6)] == [expected] * 6

    def test_asynchronously(self, expected: str, chat: Any) -> None:
        async def both() -> tuple[str, str]:
            reply = await chat.ainvoke([("system", "Be brief."), ("user", QUESTION)])
            return reply.content, "".join([chunk.content async for chunk in chat.astream(QUESTION)])

        brief, streamed = asyncio.run(both())
        assert brief
        assert streamed == expected

    def test_tools(self, chat: Any) -> None:
        from langchain_core.messages import HumanMessage, ToolMessage

        able = chat.bind_tools([{"type": "function", "function": WEATHER}], tool_choice="required")
        able = able.bind(max_tokens=300)
        asked = HumanMessage("What is the weather in Rome?")
        reply = able.invoke([asked])
        call = reply.tool_calls[0]
        assert call["name"] == "weather"
        assert call["args"]["city"] in ("Oslo", "Rome")
        streamed = None
        for chunk in able.stream([asked]):
            streamed = chunk if streamed is None else streamed + chunk
        assert [(made["name"], made["args"]) for made in streamed.tool_calls] == [
            (made["name"], made["args"]) for made in reply.tool_calls
        ]
        results = [ToolMessage("12 °C", tool_call_id=made["id"]) for made in reply.tool_calls]
        assert chat.invoke([asked, reply, *results]).content

    def test_structured_output(self, chat: Any) -> None:
        from pydantic import BaseModel

        class City(BaseModel):
            name: str
            in_europe: bool

        found = chat.with_structured_output(City, method="json_schema").invoke("Describe Paris as JSON.")
        assert isinstance(found, City)
        shaped = chat.with_structured_output(City, method="function_calling").bind()
        assert isinstance(shaped.invoke("Describe Paris."), City)

    def test_responses(self, expected: str, chat: Any) -> None:
        """The newer interface."""
        langchain = pytest.importorskip("langchain_openai")
        newer = langchain.ChatOpenAI(
            model=NAME,
            base_url=chat.openai_api_base,
            api_key="none",
            temperature=0,
            max_tokens=40,
            use_responses_api=True,
        )
        assert newer.invoke(QUESTION).text == expected
        assert "".join(chunk.text for chunk in newer.stream(QUESTION)) == expected


class TestHaystack:
    @pytest.fixture
    def generator(self, url: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        pytest.importorskip("haystack")
        from haystack.components.generators.chat import OpenAIChatGenerator

        options = {"temperature": 0, "max_tokens": 40}
        return OpenAIChatGenerator(model=NAME, api_base_url=f"{url}/v1", generation_kwargs=options)

    def test_answers_and_streams(self, expected: str, generator: Any) -> None:
        from haystack.dataclasses import ChatMessage

        dialog = [ChatMessage.from_user(QUESTION)]
        (reply,) = generator.run(dialog)["replies"]
        assert reply.text == expected
        assert reply.meta["usage"]["completion_tokens"] > 3
        pieces: list[str] = []
        streamed = generator.run(dialog, streaming_callback=lambda chunk: pieces.append(chunk.content))
        assert streamed["replies"][0].text == "".join(pieces) == expected

    def test_tools(self, generator: Any) -> None:
        from haystack.dataclasses import ChatMessage
        from haystack.tools import Tool

        tool = Tool(**WEATHER, function=lambda city, days: f"{days} days of sun in {city}")
        dialog = [ChatMessage.from_user("What is the weather in Rome?")]
        options = {"tool_choice": "required", "max_tokens": 300}
        (reply,) = generator.run(dialog, tools=[tool], generation_kwargs=options)["replies"]
        call = reply.tool_calls[0]
        result = ChatMessage.from_tool(tool.invoke(**call.arguments), origin=call)
        assert "days of sun" in result.tool_call_result.result
        one = ChatMessage.from_assistant(tool_calls=[call])
        assert generator.run([*dialog, one, result], tools=[tool])["replies"]


QUESTIONS = [
    {"question": "Which of these is a fruit?", "choices": ["apple", "hammer", "a stone, and a very old one"]},
    {"question": "Two and two are", "choices": ["four", "nine"]},
    {"question": "The 🦙 lives in", "choices": ["the Andes", "the sea"]},
]


class TestHarness:
    """EleutherAI's lm-evaluation-harness, on a task of local data."""

    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        lm_eval = pytest.importorskip("lm_eval")
        data = tmp_path / "questions.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), "utf-8")
        task = {
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "doc_to_text": "Question: {{question}}\nAnswer:",
        }

        def run(model: str, arguments: dict[str, Any], how: dict[str, Any], **options: Any) -> list[dict]:
            found = lm_eval.simple_evaluate(
                model=model, model_args=arguments, tasks=[task | how], bootstrap_iters=0, **options
            )
            return found["samples"]["local"]

        return run

    @pytest.fixture
    def tokenizer(self, demo_ckpt: Path, tmp_path: Path) -> Path:
        pytest.importorskip("transformers")
        convert(demo_ckpt, tmp_path / "hf", to="hf")
        return tmp_path / "hf"

    @pytest.mark.parametrize("concurrent", [1, 3])
    @pytest.mark.parametrize("tokenized", [True, False])
    def test_loglikelihoods(
        self, demo: Llama, url: str, tokenizer: Path, tokenized: bool, concurrent: int, run: Any
    ) -> None:
        """Are those in process: `logprobs` and `echo` of the library."""
        arguments = {
            "model": NAME,
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(tokenizer),
            "tokenized_requests": tokenized,
            "num_concurrent": concurrent,
        }
        choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
        samples = run("local-completions", arguments, choice)
        assert len(samples) == len(QUESTIONS)
        for sample in samples:
            for request, ((told, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
                context, continuation = request
                encode = demo.tokenizer.encode
                whole = encode(context + continuation, bos=False, eos=False)
                begins = len(encode(context, bos=False, eos=False))
                assert told == pytest.approx(self.score(demo, whole)[begins:].sum(), rel=1e-6)
                assert isinstance(greedy, bool)

    @staticmethod
    def score(llama: Llama, ids: list[int]) -> Any:
        import numpy

        _, logprobs = llama.generate([ids], max_gen_len=0, temperature=0, logprobs=True, echo=True)
        return numpy.array(logprobs[0])

    def test_chats(self, expected: str, url: str, run: Any) -> None:
        arguments = {"model": NAME, "base_url": f"{url}/v1/chat/completions"}
        how = {
            "output_type": "generate_until",
            "doc_to_text": QUESTION,
            "doc_to_target": "Paris",
            "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 40, "temperature": 0},
            "metric_list": [{"metric": "exact_match"}],
        }
        samples = run("local-chat-completions", arguments, how, apply_chat_template=True)
        assert [sample["resps"] for sample in samples] == [[[expected]]] * len(QUESTIONS)


def test_promptfoo(expected: str, url: str, tmp_path: Path) -> None:
    """A program from npm."""
    promptfoo = os.environ.get("PROMPTFOO") or shutil.which("promptfoo")
    if not promptfoo:
        pytest.skip("promptfoo is not installed")
    config = {
        "prompts": ["{{question}}"],
        "providers": [
            {
                "id": f"openai:chat:{NAME}",
                "config": {"apiBaseUrl": f"{url}/v1", "apiKey": "none", "temperature": 0, "max_tokens": 40},
            }
        ],
        "tests": [
            {"vars": {"question": QUESTION}, "assert": [{"type": "equals", "value": expected}]},
            {"vars": {"question": "Say yes."}, "assert": [{"type": "latency", "threshold": 60_000}]},
        ],
    }
    (tmp_path / "promptfooconfig.json").write_text(json.dumps(config))
    environment = {
        **os.environ,
        "PROMPTFOO_DISABLE_TELEMETRY": "1",
        "PROMPTFOO_DISABLE_UPDATE": "1",
        "PROMPTFOO_CONFIG_DIR": str(tmp_path / "own"),
    }
    done = subprocess.run(
        [promptfoo, "eval", "-c", "promptfooconfig.json", "--no-cache", "-o", "out.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stats = json.loads((tmp_path / "out.json").read_text())["results"]["stats"]
    assert (stats["successes"], stats["failures"], stats["errors"]) == (2, 0, 0)
