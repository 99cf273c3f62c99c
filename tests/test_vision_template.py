"""Dialogs with images as Meta's code has them, and its chat template on the Hugging Face hub."""

import io
from pathlib import Path

import llama_models.llama3.chat_format as meta
import pytest
import tokenizers
from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
from PIL import Image
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llama.checkpoint.hf_export import LLAMA3_TEMPLATE
from llama.tokenizer import Tokenizer
from llama.tokenizer.chat_format import ChatFormat
from llama.tokenizer.content import IMAGE, split_dialog
from llama.tokenizer.template import ChatTemplate
from tests.support import ROOT

IMAGE_PART = {"type": "image", "image": b"any"}


@pytest.fixture(scope="module")
def template(llama3_tokenizer: Tokenizer) -> ChatTemplate:
    path = ROOT / "tests/data/prompts/llama-3.2-vision-instruct.jinja"
    source = '{%- set date_string = "26 Jul 2024" %}' + path.read_text("utf-8")
    return ChatTemplate(llama3_tokenizer, source, path, "<|begin_of_text|>")


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*content: object) -> dict:
    return {"role": "user", "content": list(content)}


DIALOGS = [
    [user(IMAGE_PART, text("What is this?"))],
    [user(text("Compare "), IMAGE_PART, text(" with "), IMAGE_PART)],
    [user(IMAGE_PART, text("And?")), {"role": "assistant", "content": "A cat."}, user(text("Sure?"))],
    [{"role": "system", "content": "Be brief."}, user(IMAGE_PART, text("What is this?"))],
    [user(text("Hi")), {"role": "assistant", "content": "Hi."}, user(IMAGE_PART, IMAGE_PART)],
]


@pytest.mark.parametrize("dialog", DIALOGS)
def test_dialogs_with_images_equal_transformers(template: ChatTemplate, dialog: list) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(BPE()), bos_token="<|begin_of_text|>"
    )
    expected = theirs.apply_chat_template(
        dialog, chat_template=template.source, tokenize=False, add_generation_prompt=True
    )
    ids = template.encode_dialog_prompt(split_dialog(dialog)[0])
    assert template.tokenizer.decode(ids) == expected
    assert ids.count(template.tokenizer.special_tokens[IMAGE]) == expected.count(IMAGE) > 0


def test_typed_image_tokens_stay_text(template: ChatTemplate) -> None:
    bare, images = split_dialog([user(text(f"{IMAGE} and"), IMAGE_PART, text(IMAGE))])
    ids = template.encode_dialog_prompt(bare)
    assert ids.count(template.tokenizer.special_tokens[IMAGE]) == len(images) == 1
    assert template.tokenizer.decode(ids).count(IMAGE) == 3


def test_a_next_turn_with_an_image_is_the_rest_of_the_dialog(template: ChatTemplate) -> None:
    first, answer = user(IMAGE_PART, text("What is this?")), {"role": "assistant", "content": "A cat."}
    last = user(IMAGE_PART, text("And this?"))
    bare, _ = split_dialog([first, answer, last])
    ids = template.encode_dialog_prompt(bare[:1])
    ids += template.tokenizer.encode("A cat.", bos=False, eos=False)
    assert ids + template.encode_next_turn(bare[2]["content"]) == template.encode_dialog_prompt(bare)


@pytest.mark.parametrize("dialog", [*DIALOGS, [user(text("  Compare\n"), IMAGE_PART, text(" with a cat. "))]])
def test_native_dialogs_are_metas(template: ChatTemplate, metas_tokenizer, dialog: list) -> None:
    """Also through the template that folders converted to Hugging Face's form get."""
    theirs = meta.ChatFormat(metas_tokenizer)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    messages = []
    for message in dialog:
        content = message["content"]
        if isinstance(content, list):
            content = [
                RawTextItem(text=part["text"]) if "text" in part else RawMediaItem(data=picture.getvalue())
                for part in content
            ]
        messages.append(RawMessage(role=message["role"], content=content))
    expected = theirs.encode_dialog_prompt(messages).tokens
    bare, _ = split_dialog(dialog)
    tokenizer = template.tokenizer
    exported = ChatTemplate(tokenizer, LLAMA3_TEMPLATE, Path("ours"), "<|begin_of_text|>")
    image = tokenizer.special_tokens[IMAGE]
    for formatter in (ChatFormat(tokenizer), exported):
        ids = formatter.encode_dialog_prompt(bare)
        assert [128256 if token == image else token for token in ids] == expected
