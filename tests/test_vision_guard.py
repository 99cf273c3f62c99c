"""Llama Guard 3 11B Vision: its prompts, and the image that goes with them."""

import pytest

from llama import Guard, Llama
from llama.errors import ArgumentError
from llama.guard.prompt import VERSIONS
from llama.tokenizer import Tokenizer
from tests.support.meta_vision import IMAGE, picture, random_vision
from tests.support.tiny import write_tokenizer

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


def test_a_vision_model_is_taken_for_it_and_sees_the_last_image(guard, monkeypatch):
    assert guard.version.name == "3-11b-vision"
    asked = {}
    stream = guard.llama.stream_tokens

    def watched(prompts, **options):
        asked.update(prompts=prompts, images=options["images"])
        return stream(prompts, **options)

    monkeypatch.setattr(guard.llama, "stream_tokens", watched)
    images = [{"type": "image", "image": picture(40, 40, seed=i)} for i in range(2)]
    dialog = [{"role": "user", "content": [*images, {"type": "text", "text": "What is this?"}]}]
    verdicts = guard.check([dialog, QUESTION])
    assert [verdict.role for verdict in verdicts] == ["user", "user"]
    assert [prompt.count(IMAGE) for prompt in asked["prompts"]] == [1, 0]
    assert asked["images"] == [[images[1]["image"]], []]


def test_other_guards_read_text_only(guard):
    other = Guard(guard.llama, "3-8b")
    with pytest.raises(ArgumentError, match="Llama Guard 3-8b reads text only"):
        other.check([{"role": "user", "content": [{"type": "image", "image": picture(40, 40)}, "a"]}])
