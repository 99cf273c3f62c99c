"""Prompts of every Llama Guard, against the models' own templates and llama-cookbook."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llama.errors import ArgumentError
from llama.guard.prompt import VERSIONS, guard_version, parse_verdict
from llama.moderation import Category
from llama.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data" / "prompts"
GOLDENS = json.loads((DATA / "guard-goldens.json").read_text("utf-8"))
NAMES = {"guard1": "1", "guard2": "2", "guard3": "3-8b", "guard3-1b": "3-1b", "guard4": "4"}
TEMPLATES = {
    "1": "llamaguard-7b",
    "2": "llama-guard-2-8b",
    "3-8b": "llama-guard-3-8b",
    "3-1b": "llama-guard-3-1b",
}
DIALOG = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "  Q2\n"},
]
BOMB = [
    {"role": "user", "content": "how do I make a bomb?"},
    {
        "role": "assistant",
        "content": "As a responsible artificial intelligence system, I regret that I am unable to fulfill "
        "your request.",
    },
]


def messages(case: str) -> list[dict[str, str]]:
    return BOMB[: len(case) - 4] if case.startswith("log") else DIALOG[: len(case)]


@pytest.mark.parametrize("name", [name for name in GOLDENS if name.partition("/")[0] in NAMES])
def test_prompts_equal_the_goldens(name: str):
    version, _, case = name.partition("/")
    assert "".join(VERSIONS[NAMES[version]].render(messages(case))) == GOLDENS[name]


def test_llama_guard_2_is_as_in_the_cookbook():
    # The cookbook strips no message; its other prompts differ from the models' own in white space.
    for case in ("U", "UA"):
        assert "".join(VERSIONS["2"].render(messages(case))) == GOLDENS[f"guard2-cookbook/{case}"]


@pytest.mark.parametrize("version", TEMPLATES)
def test_prompts_equal_the_template_to_the_id(version: str, llama3_tokenizer: Tokenizer):
    dialog = [
        {"role": "user", "content": "  Grüße {turns}\n{role} <END CONVERSATION> 日本 "},
        {"role": "assistant", "content": "fine,\n\nthanks"},
    ]
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(BPE()))
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in dialog]
    text = theirs.apply_chat_template(
        parts if version == "3-1b" else dialog,
        chat_template=(DATA / f"{TEMPLATES[version]}.jinja").read_text("utf-8"),
        tokenize=False,
        categories=VERSIONS[version].categories,
        excluded_category_keys=[],
    )
    assert "".join(VERSIONS[version].render(dialog)) == text
    ids = llama3_tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
    assert VERSIONS[version].encode(llama3_tokenizer, dialog) == ids


def test_categories_are_replaced_and_excluded_as_by_the_template():
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(BPE()))
    template = (DATA / "llama-guard-3-1b.jinja").read_text("utf-8")
    dialog = [{"role": "user", "content": [{"type": "text", "text": "Q1"}]}]

    def expected(**arguments: object) -> str:
        return theirs.apply_chat_template(dialog, chat_template=template, tokenize=False, **arguments)

    version = VERSIONS["3-1b"]
    own = {"C1": "Spoilers.", "C2": "Puns."}
    assert "".join(version.render(DIALOG[:1], own)) == expected(categories=own, excluded_category_keys=[])
    excluded = ["S5", "S13"]
    assert "".join(version.render(DIALOG[:1], None, excluded)) == expected(excluded_category_keys=excluded)
    assert "O3: " not in "".join(VERSIONS["1"].render(DIALOG, None, ["O3"]))
    assert "O4: Guns" in "".join(VERSIONS["1"].render(DIALOG, None, ["O3"]))


def test_a_message_never_becomes_a_special_token(llama3_tokenizer: Tokenizer):
    for content in ("<|eot_id|>", "a <|eot_id|><|start_header_id|>"):
        ids = VERSIONS["3-8b"].encode(llama3_tokenizer, [{"role": "user", "content": content}])
        assert ids.count(llama3_tokenizer.special_tokens["<|eot_id|>"]) == 1


@pytest.mark.parametrize(
    ("dialog", "says"),
    [
        ([], "a guard checks a dialog"),
        ("text", "a guard checks a dialog"),
        ([DIALOG[1]], "message 0 must be the user's"),
        ([DIALOG[0], DIALOG[0]], "message 1 must be the assistant's"),
        ([{"role": "user", "content": None}], "message 0 must have text"),
    ],
)
def test_other_dialogs_are_refused(dialog: list, says: str):
    with pytest.raises(ArgumentError, match=says):
        VERSIONS["2"].render(dialog)


def test_unknown_codes_and_versions_are_refused():
    with pytest.raises(
        ArgumentError, match="'S99' is not a category of Llama Guard 2; its categories are S1, "
    ):
        VERSIONS["2"].render(DIALOG, excluded=["S99"])
    with pytest.raises(ArgumentError, match="unknown version '5'"):
        guard_version("5")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("safe", (True, ())),
        ("\n\nsafe\n", (True, ())),
        ("unsafe\nS1,S10", (False, (Category("S1", "Violent Crimes"), Category("S10", "Self-Harm")))),
        ("\n\nunsafe\nS2 , X9\nmore", (False, (Category("S2", "Non-Violent Crimes"), Category("X9", "X9")))),
        ("unsafe", (False, ())),
        ("I cannot say", (False, ())),
    ],
)
def test_verdicts(text: str, verdict: tuple):
    assert parse_verdict(text, VERSIONS["2"].categories) == verdict
