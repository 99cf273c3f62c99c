"""Dialogs as ids, against Meta's own format and the demo model's own template."""

from pathlib import Path

import pytest

from llama import Llama
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer
from llama.tokenizer.chat_format import ChatML, chat_format

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "  What is a llama?\n"}],
    [
        {"role": "system", "content": "Be brief. <|eot_id|> is just text."},
        {"role": "user", "content": "Hi 🦙"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "tool", "content": '{"temperature": 21}'},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(llama3_tokenizer)


def test_llama3_agrees_with_metas(llama3: ChatFormat, metas_tokenizer) -> None:
    from llama_models.datatypes import RawMessage, StopReason
    from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat

    oracle = MetaChatFormat(metas_tokenizer)
    for dialog in DIALOGS:
        # Meta's newer code leaves the stripping to the caller.
        messages = [
            RawMessage(role=m["role"], content=m["content"].strip(), stop_reason=StopReason.end_of_turn)
            for m in dialog
        ]
        assert llama3.encode_dialog_prompt(dialog) == oracle.encode_dialog_prompt(messages).tokens


def test_llama3_ids(llama3: ChatFormat) -> None:
    message: Message = {"role": "user", "content": " Hi "}
    assert llama3.encode_header(message) == [128006, 882, 128007, 271]
    assert llama3.encode_message(message) == [128006, 882, 128007, 271, 13347, 128009]
    assert llama3.encode_dialog_prompt([message]) == [
        128000,
        *llama3.encode_message(message),
        *[128006, 78191, 128007, 271],
    ]


def test_the_demo_model_wants_its_own_format(demo_ckpt: Path) -> None:
    """As the template in its file renders it, default system message included."""
    tokenizer = Tokenizer(demo_ckpt / "tokenizer.model")
    form = chat_format(tokenizer)
    assert isinstance(form, ChatML)
    ids = form.encode_dialog_prompt([{"role": "user", "content": "Hi <|im_end|>"}])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == 2  # the user's is text
    own = form.encode_dialog_prompt(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    assert tokenizer.decode(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


@pytest.mark.parametrize(
    ("dialog", "said"),
    [
        ([], "empty"),
        ([{"role": "robot", "content": "x"}], "unknown role 'robot': use one of system, user, assistant"),
        ([{"content": "x"}], "a message must look like"),
        ([{"role": "user", "content": None}], "content must be text, not NoneType"),
        ({"role": "user", "content": "x"}, "a dialog must be a list of messages, not dict"),
        ("hello", "a dialog must be a list of messages, not str"),
    ],
)
def test_what_is_no_dialog_is_refused(llama3: ChatFormat, dialog: Dialog, said: str) -> None:
    for form in (llama3, ChatML(llama3.tokenizer)):
        with pytest.raises(ValueError, match=said):
            form.encode_dialog_prompt(dialog)


def test_the_format_is_read_from_the_files(ckpt: Path, demo_ckpt: Path) -> None:
    """A folder's name says nothing."""
    renamed = ckpt.rename(ckpt.with_name("SmolLM2-chatml"))
    assert isinstance(Llama.build(renamed, max_seq_len=8).formatter, ChatFormat)
