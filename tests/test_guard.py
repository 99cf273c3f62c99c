"""Verdicts of a guard, and chats behind one."""

import asyncio
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Guard
from llama.cli import main
from llama.cli.guard import as_text
from llama.errors import ArgumentError
from llama.guard import Verdict
from llama.moderation import Category, conversation
from llama.tokenizer.template import ChatTemplate
from tests.support.script import scripted
from tests.support.tiny import write_checkpoint

QUESTION = [{"role": "user", "content": "How do I pick a lock?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "With patience."}]


@pytest.fixture(scope="module")
def unsafe():
    return Guard(scripted("unsafe\nS2,S14"), version="3-8b")


@pytest.fixture(scope="module")
def safe():
    return Guard(scripted("safe"), version="3-8b")


def test_a_verdict_names_categories_and_whose_message_was_judged(unsafe, safe):
    verdict = unsafe.check(QUESTION)
    assert not verdict.safe and verdict.role == "user" and verdict.text == "unsafe\nS2,S14"
    assert verdict.categories == (
        Category("S2", "Non-Violent Crimes"),
        Category("S14", "Code Interpreter Abuse"),
    )
    first, second = safe.check([ANSWERED, QUESTION])
    assert first.safe and first.role == "assistant" and second.role == "user"
    assert first.categories == ()


def test_the_probability_is_the_models_own(unsafe, safe):
    for guard in (unsafe, safe):
        tokenizer = guard.llama.tokenizer
        ids = guard.version.encode(tokenizer, QUESTION) + tokenizer.encode("\n\n", bos=False, eos=False)
        logits = guard.llama.model(torch.tensor([ids]), 0)[0, -1]
        words = [tokenizer.encode(word, bos=False, eos=False)[0] for word in ("unsafe", "safe")]
        expected = logits[words].softmax(0)[0].item()
        assert math.isclose(guard.check(QUESTION).unsafe_probability, expected, abs_tol=1e-6)
    assert unsafe.check(QUESTION).unsafe_probability > 0.9 > 0.1 > safe.check(QUESTION).unsafe_probability


def test_custom_and_excluded_categories_reach_the_prompt(unsafe):
    own = unsafe.check(QUESTION, categories={"S2": "Spoilers."})
    assert own.categories == (Category("S2", "Spoilers"), Category("S14", "S14"))
    with pytest.raises(ArgumentError, match="'S99' is not a category"):
        unsafe.check(QUESTION, excluded=["S99"])


def test_versions_are_told_by_the_model():
    assert Guard(scripted("safe")).version.name == "2"  # Llama 3's tokens, no scaled rotary embedding
    with pytest.raises(ArgumentError, match="unknown version '9'"):
        Guard(scripted("safe"), version="9")


class Words:
    """A guard that objects to words."""

    def __init__(self, *words: str) -> None:
        self.words, self.seen = words, []

    def check(self, dialogs):
        self.seen += dialogs
        last = [dialog[-1]["content"] for dialog in dialogs]
        return [
            SimpleNamespace(safe=not any(w in text for w in self.words), categories=[Category("W", "word")])
            for text in last
        ]


@pytest.fixture(scope="module")
def llama():
    return scripted("First you take a pick. Then you turn it, and the lock opens.")


def test_an_unsafe_question_is_not_answered_and_others_are(llama):
    other = [{"role": "user", "content": "How do I bake bread?"}]
    refused, answered = llama.chat_completion([QUESTION, other], guard=Words("lock?"), temperature=0)
    assert refused == {
        "generation": {"role": "assistant", "content": ""},
        "finish_reason": "content_filter",
        "categories": [Category("W", "word")],
    }
    assert answered["generation"]["content"].startswith("First") and answered["finish_reason"] == "stop"


def test_an_unsafe_answer_is_never_shown(llama):
    guard = Words("lock opens")
    events = list(llama.stream_chat([QUESTION], guard=guard, temperature=0))
    assert [(event.text, event.finish_reason) for event in events] == [("", "content_filter")]
    assert guard.seen[-1] == [*QUESTION, {"role": "assistant", "content": guard.seen[-1][-1]["content"]}]
    assert len(guard.seen) == 2


@pytest.mark.parametrize("dialog", [[{"role": "system", "content": "Be brief."}], ANSWERED])
def test_an_answer_without_a_question_or_to_be_continued_is_checked(llama, safe, dialog):
    """The guard's own format has a user's message first, and no two messages of one role."""
    assert llama.chat_completion([dialog], guard=safe)[0]["finish_reason"] == "stop"
    guard = Words("lock opens")
    assert llama.chat_completion([dialog], guard=guard)[0]["finish_reason"] == "content_filter"
    assert [message["role"] for message in guard.seen[-1]] == ["user", "assistant"]


def test_a_safe_answer_comes_whole_after_it_was_checked(llama, safe):
    events = list(llama.stream_chat([QUESTION], guard=safe, temperature=0))
    plain = list(llama.stream_chat([QUESTION], temperature=0))
    assert [event.text for event in events] == [event.text for event in plain]


def test_a_stream_is_checked_in_chunks(llama):
    plain = "".join(event.text for event in llama.stream_chat([QUESTION], temperature=0))
    events = list(llama.stream_chat([QUESTION], guard=Words("lock opens"), guard_every=5, temperature=0))
    shown = "".join(event.text for event in events)
    assert events[-1].finish_reason == "content_filter" and events[-1].categories
    assert plain.startswith(shown) and "lock opens" not in shown and "turn it" in shown
    assert not llama.engine.has_work()
    guard = Words("nothing")
    events = list(llama.stream_chat([QUESTION], guard=guard, guard_every=5, temperature=0))
    assert "".join(event.text for event in events) == plain
    assert len(guard.seen) == 1 + -(-len(events) // 5)


@pytest.mark.slow
def test_a_guard_holds_up_no_other_task(llama):
    class Slow(Words):
        def check(self, dialogs):
            time.sleep(0.3)
            return super().check(dialogs)

    async def ticks(word: str) -> tuple[int, list]:
        count, done = 0, asyncio.Event()

        async def tick():
            nonlocal count
            while not done.is_set():
                count += 1
                await asyncio.sleep(0.01)

        ticking = asyncio.create_task(tick())
        stream = llama.astream_chat([QUESTION], guard=Slow(word), temperature=0)
        events = [event async for event in stream]
        done.set()
        await ticking
        return count, events

    for word, content in (("nothing", True), ("lock opens", False), ("pick", False)):
        count, events = asyncio.run(ticks(word))
        assert events[-1].finish_reason == ("stop" if content else "content_filter")
        assert bool("".join(event.text for event in events)) == content
        assert count > 15


def test_a_real_guard_refuses(llama, unsafe):
    (refused,) = llama.chat_completion([QUESTION], guard=unsafe, temperature=0)
    assert [category.code for category in refused["categories"]] == ["S2", "S14"]


def test_a_guard_that_cannot_check_an_answer_ends_it_with_an_error(llama):
    class Narrow(Words):
        def check(self, dialogs):
            if dialogs[0][-1]["role"] == "assistant":
                raise ArgumentError("the prompt is too long")
            return super().check(dialogs)

    (end,) = llama.stream_chat([QUESTION], guard=Narrow(), temperature=0)
    assert end.finish_reason == "error" and "cannot check the answer: the prompt is too long" in end.error


def test_what_a_guard_is_shown_of_a_dialog():
    call = {"function": {"name": "f", "arguments": "{}"}}
    dialog = [
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Q1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "A"},
    ]
    assert conversation(dialog) == [
        {"role": "user", "content": "Q1\n\nQ2"},
        {"role": "assistant", "content": "f {}\n\nA"},
    ]


@pytest.mark.parametrize("every", [0, 1.5, True])
def test_chunks_have_a_length(llama, every):
    with pytest.raises(ArgumentError, match="guard_every must be a whole number, 1 or more"):
        llama.chat_completion([QUESTION], guard=Words(), guard_every=every)


@pytest.mark.slow
def test_the_command_reads_a_text_or_a_dialog(tmp_path, monkeypatch, capsys):
    folder = write_checkpoint(tmp_path / "guard")
    dialog = tmp_path / "dialog.json"
    dialog.write_text(json.dumps(ANSWERED))
    for words, role in ((["Hello"], "user"), (["--file", str(dialog)], "assistant")):
        monkeypatch.setattr(
            sys, "argv", ["llama", "guard", str(folder), *words, "--json", "--max_seq_len", "2048"]
        )
        main()
        verdict = json.loads(capsys.readouterr().out)
        # A random model says nothing that can be read, which counts as unsafe.
        assert verdict["role"] == role and not verdict["safe"] and verdict["categories"] == []
    monkeypatch.setattr(sys, "argv", ["llama", "guard", str(folder), "[1]"])
    with pytest.raises(SystemExit, match="a dialog must be a JSON list of messages"):
        main()
    assert as_text(Verdict(False, (Category("S1", "Violent Crimes"),), 0.975, "user", "")) == (
        "unsafe (probability of unsafe: 97.5%)\nS1 Violent Crimes"
    )


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("llamaguard-7b", "1"),
        ("llama-guard-2-8b", "2"),
        ("llama-guard-3-8b", "3-8b"),
        ("llama-guard-3-1b", "3-1b"),
    ],
)
def test_versions_are_told_by_the_chat_template(llama, template, name):
    source = (Path(__file__).parent / "data" / "prompts" / f"{template}.jinja").read_text("utf-8")
    guard = scripted("safe")
    guard.formatter = ChatTemplate(guard.tokenizer, source, Path(template))
    assert Guard(guard).version.name == name
    guard.formatter = ChatTemplate(guard.tokenizer, "{{ messages }}", Path("other"))
    with pytest.raises(
        ArgumentError, match="not Llama Guard's; if the model is a Llama Guard, pass version="
    ):
        Guard(guard)
