"""Llama Guard 3 11B Vision: its prompts, and the image that goes with them."""

from dataclasses import replace

import pytest

from llama import Guard, Llama
from llama.errors import ArgumentError
from llama.guard.prompt import VERSIONS
from llama.tokenizer import Tokenizer
from tests.support.tiny import write_tokenizer
from tests.support.vision import IMAGE, picture, random_vision

QUESTION = [{"role": "user", "content": "What is this?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "A llama."}]


def test_the_frame_of_its_template_differs_from_the_1b_only_in_the_image_and_a_space():
    """As Meta's template on Hugging Face has them."""
    for dialog in (QUESTION, ANSWERED):
        text = "".join(VERSIONS["3-1b"].render(dialog))
        frame = VERSIONS["3-11b-vision"]
        spelled = text.replace("<BEGIN UNSAFE CONTENT", "<BEGIN UNSAFECONTENT")
        assert "".join(frame.render(dialog)) == spelled
        assert "".join(frame.render(dialog, image=True)) == spelled.replace("Task:", "<|image|> Task:")
        assert list(frame.categories) == [f"S{n}" for n in range(1, 14)]


def test_the_frame_of_llama_stack():
    text = "".join(VERSIONS["3-11b-vision-stack"].render(ANSWERED, image=True))
    assert "\n\n<|image|>Task: Check if there is unsafe content in 'Assistant' messages" in text
    assert "User: What is this?\n\nAssistant: A llama.\n\n<END CONVERSATION>" in text
    assert "<BEGIN UNSAFE CONTENT CATEGORIES>" in text
    assert "violated categories.<|eot_id|>" in text


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Guard:
    path = tmp_path_factory.mktemp("guard") / "tokenizer.model"
    write_tokenizer(path)
    return Guard(Llama(random_vision(max_seq_len=1600), Tokenizer(path)))


@pytest.fixture
def asked(guard, monkeypatch) -> dict:
    """What the guard's model was asked last."""
    asked = {}
    stream = guard.llama.stream_tokens

    def watched(prompts, **options):
        asked.update(prompts=prompts, images=options["images"])
        return stream(prompts, **options)

    monkeypatch.setattr(guard.llama, "stream_tokens", watched)
    return asked


def test_a_vision_model_is_taken_for_it_and_sees_the_last_image(guard, asked):
    assert guard.version.name == "3-11b-vision"
    images = [{"type": "image", "image": picture(40, 40, seed=i)} for i in range(2)]
    dialog = [{"role": "user", "content": [*images, {"type": "text", "text": "What is this?"}]}]
    verdicts = guard.check([dialog, QUESTION])
    assert [verdict.role for verdict in verdicts] == ["user", "user"]
    assert [prompt.count(IMAGE) for prompt in asked["prompts"]] == [1, 0]
    assert asked["images"] == [[images[1]["image"]], []]


@pytest.mark.slow
def test_a_chat_shows_it_the_images(guard, asked):
    """Even of a question without text. What a random model says is not "safe"."""
    picture_of = [{"type": "image", "image": picture(40, 40, seed=i)} for i in range(2)]
    first = [{"role": "user", "content": picture_of[:1]}, {"role": "assistant", "content": "A llama."}]
    for last in ([picture_of[1]], [picture_of[1], "And this?"]):
        (answer,) = guard.llama.chat_completion(
            [[*first, {"role": "user", "content": last}]], guard=guard, max_gen_len=1
        )
        assert answer["finish_reason"] == "content_filter"
        assert asked["prompts"][0].count(IMAGE) == 1
        assert asked["images"] == [[picture_of[1]["image"]]]


@pytest.mark.slow
def test_a_chat_shows_its_answer_with_the_image(guard, asked, monkeypatch):
    check, judged = guard.check, []

    def lenient(dialogs):
        judged.append(dialogs)
        return [replace(verdict, safe=True) for verdict in check(dialogs)]

    monkeypatch.setattr(guard, "check", lenient)
    dialog = [{"role": "user", "content": ["What is this?", {"type": "image", "image": picture(40, 40)}]}]
    (answer,) = guard.llama.chat_completion([dialog], guard=guard, max_gen_len=1, temperature=0)
    assert answer["finish_reason"] == "length"
    assert [message["role"] for message in judged[1][0]] == ["user", "assistant"]
    assert [prompt.count(IMAGE) for prompt in asked["prompts"]] == [1]


def test_other_guards_are_not_shown_the_images_of_a_chat(guard, asked):
    other = Guard(guard.llama, "3-8b")
    dialog = [{"role": "user", "content": ["What is this?", {"type": "image", "image": picture(40, 40)}]}]
    (answer,) = guard.llama.chat_completion([dialog], guard=other, max_gen_len=1)
    assert answer["finish_reason"] == "content_filter"
    assert asked["images"] == [[]]


def test_other_guards_read_text_only(guard):
    other = Guard(guard.llama, "3-8b")
    with pytest.raises(ArgumentError, match="Llama Guard 3-8b reads text only"):
        other.check([{"role": "user", "content": [{"type": "image", "image": picture(40, 40)}, "a"]}])
