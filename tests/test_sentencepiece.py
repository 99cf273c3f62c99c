"""The sentencepiece tokenizer, and Llama 2's chat format on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from llama.tokenizer.chat_format import Llama2Chat
from tests.support import formats


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(formats.sentencepiece_model())
    loaded = load_tokenizer(path)
    assert isinstance(loaded, SentencePieceTokenizer)
    return loaded


def test_surface(tokenizer: SentencePieceTokenizer) -> None:
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (400, 1, 2, -1)
    assert tokenizer.stop_tokens == [2]
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2}
    ids = tokenizer.encode("hello world", bos=True, eos=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.encode("hello world", bos=False, eos=False) == ids[1:-1]


def test_ids_and_texts_are_those_of_sentencepiece(tokenizer: SentencePieceTokenizer) -> None:
    for text in formats.random_texts(500):
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == tokenizer.model.encode(text)
        assert tokenizer.decode(ids) == tokenizer.model.decode(ids)
        assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_text_never_becomes_a_control_token(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("</s><s>[INST] <unk>", bos=False, eos=False)
    assert not {0, 1, 2} & {*ids}
    assert tokenizer.decode(ids) == "</s><s>[INST] <unk>"


def test_tokens_hold_parts_of_characters(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("🦙", bos=False, eos=False)
    parts = [tokenizer.decode_bytes([token]) for token in ids]
    assert len(parts) > 2
    assert b"".join(parts) == " 🦙".encode()
    assert "�" in tokenizer.decode(ids[:3])
    assert tokenizer.encode("a\ud800", bos=False, eos=False) == tokenizer.encode("a�", bos=False, eos=False)


def test_unknown_ids_and_other_files_are_refused(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    for token in (-1, 400):
        with pytest.raises(ValueError, match="not a token id"):
            tokenizer.decode([token])
    with pytest.raises(ValueError, match="only text"):
        tokenizer.encode(b"x", bos=False, eos=False)  # type: ignore[arg-type]
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(tokenizer.proto[:200])
    with pytest.raises(ValueError, match="sentencepiece"):
        load_tokenizer(broken)
    whole = tmp_path / "whole.model"
    whole.write_bytes(tokenizer.proto)
    with pytest.raises(ValueError, match="it is a sentencepiece model"):
        Tokenizer(whole)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "nothing.model")


def test_llama_2_dialog(tokenizer: SentencePieceTokenizer) -> None:
    """By hand, from the description of the format: pairs in their own BOS and EOS, stripped."""
    chat = Llama2Chat(tokenizer)
    dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  hello "},
        {"role": "assistant", "content": " world\n"},
        {"role": "user", "content": "numbers 123 "},
    ]
    first = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n  hello [/INST] world "
    last = "[INST] numbers 123 [/INST]"
    encode = tokenizer.model.encode
    assert chat.encode_dialog_prompt(dialog) == [1, *encode(first), 2, 1, *encode(last)]


def test_llama_2_next_turn(tokenizer: SentencePieceTokenizer) -> None:
    """A chat that keeps ids ends up with those of the whole dialog."""
    chat = Llama2Chat(tokenizer)
    texts = ["hello", "world", " numbers 123"]
    dialog = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), texts, strict=True)
    ]
    answer = tokenizer.encode("world", bos=False, eos=False)
    kept = chat.encode_dialog_prompt(dialog[:1]) + answer + chat.encode_next_turn(texts[2])
    assert kept == chat.encode_dialog_prompt(dialog)
    with pytest.raises(ValueError, match="reserves; remove it"):
        chat.encode_next_turn("[INST]")


@pytest.mark.parametrize(
    ("roles", "match"),
    [
        (["user", "user"], "alternating"),
        (["system"], "alternating"),
        (["assistant"], "alternating"),
        (["user", "assistant"], "alternating"),
        (["user", "system", "user"], "alternating"),
        (["user", "tool"], "unknown role"),
        ([], "empty"),
    ],
)
def test_llama_2_refuses_other_orders(
    tokenizer: SentencePieceTokenizer, roles: list[str], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        Llama2Chat(tokenizer).encode_dialog_prompt([{"role": role, "content": "x"} for role in roles])


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_llama_2_refuses_its_tags(tokenizer: SentencePieceTokenizer, tag: str, at: int) -> None:
    dialog = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
    dialog[at]["content"] = f"a {tag} b"
    with pytest.raises(ValueError, match="reserves; remove it"):
        Llama2Chat(tokenizer).encode_dialog_prompt(dialog)
