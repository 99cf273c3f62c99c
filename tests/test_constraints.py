"""Answers in a shape, from models that would write noise."""

import itertools
import json
import re

import jsonschema
import pydantic
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis_jsonschema._canonicalise import FALSEY
from hypothesis import strategies as st

from llama import Llama
from llama.constraints import Grammars
from llama.errors import ArgumentError
from tests.support.tiny import byte_tokenizer, small_model

NOISE = {"temperature": 1.5, "top_p": 1.0}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    words = (" the", "name", '": ', '", "', "true", "null", "ü", "🦙")
    tokenizer = byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), words=words)
    return Llama(small_model(vocab_size=tokenizer.n_words + 3, max_batch_size=4, max_seq_len=512), tokenizer)


def write(llama, n=1, max_gen_len=400, **options):
    return llama.text_completion(["Hi"], n=n, max_gen_len=max_gen_len, **{**NOISE, **options})
