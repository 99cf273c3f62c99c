"""Chat templates: what transformers gives them, and the limits they are stopped at."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llama.errors import ArgumentError, CheckpointError
from llama.tokenizer.huggingface import HFTokenizer
from llama.tokenizer.template import ChatTemplate
from tests.support import formats

DIALOGS: list[list[Any]] = [
    [{"role": "user", "content": " hello, wörld <b> & 'quotes' \n"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ],
]
# One feature each of those that templates of popular models use.
TEMPLATES = [
    "{% if tools is not none %}TOOLS{% else %}none{% endif %}{{ messages[0].content }}",
    "{% if documents is none %}no{% else %}DOCUMENTS{% endif %}",
    "{% if tools is defined and documents is defined %}both{% endif %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2, sort_keys=true) }}",
    "{{ messages | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "{{ strftime_now('%Y') }}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role | trim }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro say(m) %}<{{ m.role ~ ':' ~ m['content'] }}>{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}"
    "{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == "
    "'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% endfor %}",
    "    {%- for m in messages %}\n        {{- m.content.split('o')[-1] | upper }}\n    {%- endfor %}\n",
    "{{ '%s and %d' | format('a', 3) }}{{ 'x' * 3 }}{{ messages | map(attribute='role') | join(', ') }}",
    "{% if add_generation_prompt %}{{ eos_token }}<|start|>{% endif %}{{ messages | length }}",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, HFTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    return formats.hf_tokenizer(folder), HFTokenizer(folder)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dialog", DIALOGS)
def test_as_transformers_renders_it(pair: tuple[Any, HFTokenizer], template: str, dialog: list[Any]) -> None:
    theirs, tokenizer = pair
    expected = theirs.apply_chat_template(
        dialog, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ours = ChatTemplate(tokenizer, template, Path("x"), theirs.bos_token, theirs.eos_token)
    ids = ours.encode_dialog_prompt(dialog)
    assert ids == tokenizer.encode_rendered(expected)


# Templates as they are published; a folder of others, such as popular models', may be named.
PUBLISHED = [
    path
    for folder in (Path(__file__).parent / "data" / "prompts", os.environ.get("LLAMA_TEST_TEMPLATES"))
    if folder
    for path in sorted(Path(folder).glob("*.jinja"))
]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize("dialog", [*DIALOGS, DIALOGS[1][1:], DIALOGS[1][1:2] * 2, DIALOGS[1][:1]])
def test_published_templates(pair: tuple[Any, HFTokenizer], path: Path, dialog: list[Any]) -> None:
    """The same text as transformers', or both refuse."""
    (theirs, tokenizer), template = pair, path.read_text("utf-8")
    try:
        expected = theirs.apply_chat_template(
            dialog, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:
        expected = None
    ours = ChatTemplate(tokenizer, template, path, theirs.bos_token, theirs.eos_token)
    try:
        assert ours.encode_dialog_prompt(dialog) == tokenizer.encode_rendered(expected or "refused")
    except ArgumentError:
        assert expected is None


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10**10 }}",
        "{{ 'a' * (2 ** 60) }}",
        "{{ 2 ** 1000000000 }}",
        "{{ [0] * 10**10 }}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set x = 'a' * 99999 %}{% set x = x.replace('a', x) %}{% set x = x.replace('a', x) %}",
        "{% set x = 'a' * 99999 %}{{ x | replace('a', x) | length }}",
        "{{ 'a' | center(10**10) | length }}",
        "{{ 'a'.ljust(10**10) | length }}",
        "{{ 'a' | indent(10**10, true) | length }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ lipsum(n=10**6) }}",
        "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
        "{% set y %}{% set x = 'a' * 9999999 %}{% for i in range(99) %}{{ x }}{% endfor %}{% endset %}y",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ raise_exception('not this one') }}",
    ],
)
def test_what_is_stopped(
    pair: tuple[Any, HFTokenizer], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.tokenizer.sandbox.SECONDS", 0.3)
    start = time.process_time()
    with pytest.raises(ArgumentError, match="template"):
        ChatTemplate(pair[1], template, Path("x")).encode_dialog_prompt(DIALOGS[0])
    assert time.process_time() - start < 2  # gigabytes take longer than that


def test_stopped_in_any_thread(pair: tuple[Any, HFTokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.tokenizer.sandbox.SECONDS", 0.2)
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    found: list[str] = []

    def run() -> None:
        try:
            ChatTemplate(pair[1], template, Path("x")).encode_dialog_prompt(DIALOGS[0])
        except ArgumentError as error:
            found.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 3
    assert all("was stopped: it takes longer" in text for text in found)


@pytest.mark.parametrize("template", ["{% for %}", "{{ " + "(" * 5000, "{% if x %}" * 500])
def test_templates_that_are_none(pair: tuple[Any, HFTokenizer], template: str) -> None:
    with pytest.raises(CheckpointError, match="not valid jinja2"):
        ChatTemplate(pair[1], template, Path("x"))


def test_private_characters_in_content(pair: tuple[Any, HFTokenizer]) -> None:
    tokenizer = pair[1]
    template = "{% for m in messages %}<|start_header_id|>{{ m.content }}{% endfor %}"
    every = "".join(map(chr, range(0xE000, 0xF900))) + "<|eot_id|>"
    ours = ChatTemplate(tokenizer, template, Path("x"))
    ids = ours.encode_dialog_prompt([{"role": "user", "content": every}])
    special = tokenizer.special_tokens
    assert ids == [special["<|start_header_id|>"], *tokenizer.encode(every, bos=False, eos=False)]
    assert ours.encode_next_turn(every)
