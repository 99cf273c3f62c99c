"""Chat templates with tools, against transformers."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llama.errors import ArgumentError
from llama.tokenizer import Tokenizer
from llama.tokenizer.template import ChatTemplate
from tests.tools import cases

DATA = Path(__file__).parents[1] / "data" / "prompts"
GOLDENS = json.loads((DATA / "tool-goldens.json").read_text("utf-8"))
# Llama 4's special tokens are ordinary text to Llama 3's tokenizer, and read the same.
TEMPLATES = ["llama-3.1-instruct", "llama-3.2-text-instruct", "llama-3.2-vision-instruct", "llama-4-instruct"]
TOOLS, DIALOG = GOLDENS["inputs"]["tools"], GOLDENS["inputs"]["messages"]


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer: Tokenizer) -> Tokenizer:
    return llama3_tokenizer


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    empty = tokenizers.Tokenizer(BPE())
    return PreTrainedTokenizerFast(tokenizer_object=empty, bos_token="<|begin_of_text|>")


def template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    source = (DATA / f"{name}.jinja").read_text("utf-8")
    fixed = '{%- set date_string = "26 Jul 2024" %}' + source
    return ChatTemplate(tokenizer, fixed, Path(name), "<|begin_of_text|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_calls_and_results_equal_the_goldens(name: str, tokenizer: Tokenizer):
    ids = template(name, tokenizer).encode_dialog_prompt(DIALOG, TOOLS)
    expected = GOLDENS['HF templates (date_string="26 Jul 2024"; inputs in build/goldens.py)'][
        f"{name}/tools"
    ]
    assert tokenizer.decode(ids) == expected


def test_builtin_tools_equal_the_golden(tokenizer: Tokenizer):
    call = {"function": {"name": "brave_search", "arguments": '{"query": "a"}'}}
    dialog = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r"},
    ]
    formatter = template("llama-3.1-instruct", tokenizer)
    ids = formatter.encode_dialog_prompt(dialog, builtin_tools=["brave_search", "wolfram_alpha"])
    expected = GOLDENS['HF templates (date_string="26 Jul 2024"; inputs in build/goldens.py)']
    assert tokenizer.decode(ids) == expected["llama-3.1-instruct/builtin"].replace('{"r": 1}', '"r"')


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_random_tools_equal_transformers(name: str, tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast):
    formatter = template(name, tokenizer)
    for seed in range(300):
        tools = cases.tools(seed)
        dialog = [{"role": "user", "content": cases.words(random.Random(seed), 3)}, *DIALOG[1:]]
        expected = theirs.apply_chat_template(
            dialog, chat_template=formatter.source, tools=tools, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(formatter.encode_dialog_prompt(dialog, tools)) == expected


def test_special_tokens_in_tools_and_arguments_stay_text(tokenizer: Tokenizer):
    tools = json.loads(json.dumps(TOOLS).replace('"d"', '"<|eot_id|>"'))
    dialog = json.loads(json.dumps(DIALOG).replace("<b>", "<|eom_id|>"))
    formatter = template("llama-3.1-instruct", tokenizer)
    plain = formatter.encode_dialog_prompt(DIALOG, TOOLS)
    ids = formatter.encode_dialog_prompt(dialog, tools)
    assert "<|eot_id|>" in tokenizer.decode(ids).split("Q<|eot_id|>")[0]
    for special in ("<|eot_id|>", "<|eom_id|>"):
        assert ids.count(tokenizer.special_tokens[special]) == plain.count(tokenizer.special_tokens[special])


def test_calls_that_are_none_are_refused(tokenizer: Tokenizer):
    bad = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    with pytest.raises(ArgumentError, match="a tool call must look like"):
        template("llama-3.1-instruct", tokenizer).encode_dialog_prompt([DIALOG[0], bad])
