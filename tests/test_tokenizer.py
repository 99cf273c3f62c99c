"""The tokenizer against Meta's own, on text of every kind; and what it refuses."""

import random
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest

from llama.tokenizer import Layout, Tokenizer
from tests.support import tiny


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer: Tokenizer) -> Tokenizer:
    return llama3_tokenizer


def strings(count: int, special: list[str]) -> list[str]:
    """Random text of every script, code, emoji, white space, numbers, special tokens' names."""
    pick = random.Random(0)
    assigned = [
        chr(c) for c in range(sys.maxunicode) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    code = Path(__file__).read_text().splitlines(keepends=True)
    words = [
        "the",
        " llama",
        "'s",
        "'LL",
        "don't",
        "naïve",
        "日本語",
        "हिन्दी",
        "مرحبا",
        "Привет",
        "🦙",
        "👩‍👩‍👧",
        "e\u0301",
    ]
    spaces = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u2003",
        "\n\n\n",
        " \n ",
        "\x00",
        "\x1c",
        "\ufeff",
        "\ufffd",
    ]

    def some() -> str:
        kind = pick.randrange(7)
        if kind == 0:
            return "".join(pick.choices(assigned, k=pick.randint(1, 20)))
        if kind == 1:
            start = pick.randrange(len(assigned) - 300)  # one script and its neighbours
            return "".join(pick.choices(assigned[start : start + 300], k=pick.randint(1, 30)))
        if kind == 2:
            return pick.choice(code)
        if kind == 3:
            return pick.choice(special)
        if kind == 4:
            return str(pick.getrandbits(pick.randint(1, 90)))
        return "".join(pick.choices(words + spaces, k=pick.randint(1, 12)))

    return ["".join(some() for _ in range(pick.randint(1, 4))) for _ in range(count)]


@pytest.mark.slow
def test_agrees_with_metas_on_ten_thousand_strings(tokenizer: Tokenizer, metas_tokenizer) -> None:
    for text in strings(10_000, list(tokenizer.special_tokens)):
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == metas_tokenizer.encode(text, bos=False, eos=False), repr(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 60_000,
        " " * 60_000,
        "ab " * 20_000 + "x" * 25_001 + " " * 25_001 + "y" * 25_000,
        "word " * 90_000,
        ("z" * 399_990 + " " * 30_020),
    ],
    ids=["empty", "letters", "spaces", "runs at the limit", "long", "run across pieces"],
)
def test_agrees_with_metas_on_long_texts(tokenizer: Tokenizer, metas_tokenizer, text: str) -> None:
    assert tokenizer.encode(text, bos=True, eos=True) == metas_tokenizer.encode(text, bos=True, eos=True)


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello, llama!", bos=True, eos=True) == [128000, 9906, 11, 94776, 0, 128001]
    assert tokenizer.n_words == 128256
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (128000, 128001, 128004)
    assert sorted(tokenizer.stop_tokens) == [128001, 128008, 128009]
    assert tokenizer.special_tokens["<|start_header_id|>"] == 128006
    assert sorted(tokenizer.special_tokens.values()) == list(range(128000, 128256))


def test_special_tokens_in_text_are_text_unless_allowed(tokenizer: Tokenizer) -> None:
    text = "<|eot_id|>"
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert len(ids) == 7
    assert max(ids) < 128000
    assert tokenizer.encode(text, bos=False, eos=False, allowed_special="all") == [128009]
    assert tokenizer.encode(text, bos=False, eos=False, allowed_special={text}) == [128009]
    with pytest.raises(ValueError, match="eot_id"):
        tokenizer.encode(text, bos=False, eos=False, disallowed_special={text})


def test_invalid_input(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b", bos=False, eos=False)) == "a\ufffdb"
    with pytest.raises(ValueError, match="not bytes"):
        tokenizer.encode(b"bytes", bos=False, eos=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="128256 is not a token id"):
        tokenizer.decode([128256])
    with pytest.raises(ValueError, match="-1 is not a token id"):
        tokenizer.decode([-1])


def test_a_token_may_be_a_part_of_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦙", bos=False, eos=False)
    assert [tokenizer.decode([i]) for i in ids] == ["\ufffd"] * 3
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == "🦙".encode()


def test_files_that_are_no_ranks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer(tmp_path / "nowhere")
    sentencepiece = tmp_path / "tokenizer.model"
    sentencepiece.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>")
    with pytest.raises(ValueError, match="sentencepiece"):
        Tokenizer(sentencepiece)
    page = tmp_path / "page"
    page.write_text("<!DOCTYPE html>\n<html>Sign in</html>")
    with pytest.raises(ValueError, match="line 1"):
        Tokenizer(page)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ValueError, match="empty"):
        Tokenizer(empty)


def test_a_layout_beside_the_ranks_is_used(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    tiny.write_tokenizer(path)
    assert Tokenizer(path).n_words == tiny.VOCAB
    layout = Layout({"<end>": 264}, r"\S+|\s+", None, "<end>", "<end>", ["<end>"], "chatml")
    layout.write(tmp_path / "format.json")
    tokenizer = Tokenizer(path)
    assert tokenizer.layout == layout
    assert (tokenizer.bos_id, tokenizer.stop_tokens, tokenizer.pat_str) == (None, [264], r"\S+|\s+")
    assert tokenizer.encode("the", bos=True, eos=True) == [257, 264]
    (tmp_path / "format.json").write_text('{"special_tokens": {}}')
    with pytest.raises(ValueError, match=r"format\.json: .* is not among its special_tokens"):
        Tokenizer(path)


class TestDemo:
    """SmolLM2's tokenizer, against the `tokenizers` package given the same vocabulary."""

    @pytest.fixture(scope="class")
    def tokenizer(self, demo_ckpt: Path) -> Tokenizer:
        return Tokenizer(demo_ckpt / "tokenizer.model")

    @pytest.fixture(scope="class")
    def oracle(self, tokenizer: Tokenizer):
        from tokenizers import Tokenizer as HFTokenizer
        from tokenizers import models, pre_tokenizers

        from llama.tokenizer.bpe import byte_alphabet

        letter = {byte: character for character, byte in byte_alphabet().items()}
        ranks = {t: i for t, i in tokenizer.model._mergeable_ranks.items() if i < tokenizer.n_words}
        merges = []
        for token in sorted(ranks, key=ranks.__getitem__):
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:  # the merges before its own leave the two parts that it joins
                pairs = [ranks.get(a + b, len(ranks) * 2) for a, b in pairwise(parts)]
                i = pairs.index(min(pairs))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                merges.append(tuple("".join(letter[byte] for byte in part) for part in parts))
        vocab = {"".join(letter[byte] for byte in token): i for token, i in ranks.items()}
        oracle = HFTokenizer(models.BPE(vocab, merges))
        oracle.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return oracle

    @pytest.mark.slow
    def test_agrees_on_ten_thousand_strings(self, tokenizer: Tokenizer, oracle) -> None:
        texts = strings(10_000, list(tokenizer.special_tokens))
        for text, expected in zip(texts, oracle.encode_batch(texts), strict=True):
            assert tokenizer.encode(text, bos=False, eos=False) == expected.ids, repr(text)

    def test_bytes_without_a_token_are_left_out(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.decode(tokenizer.encode("a\x04b\x1dc", bos=False, eos=False)) == "abc"
        assert tokenizer.encode("\U00040000", bos=False, eos=False)  # its first byte is F1
