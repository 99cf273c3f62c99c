"""Answers in a shape: JSON Schemas, regular expressions and Lark grammars, by the llguidance package.

A grammar says which tokens may follow, and the others are masked before one is chosen. Nothing is
compiled beforehand, and nothing here computes with the model: see `Constraint` in `llama.sampling`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llama.errors import ArgumentError, MissingPackageError
from llama.tokenizer import TextTokenizer

# JSON as Python and the models write it. With one way to write a thing, more tokens are forced, and no
# model can go on with white space for ever. A schema must not switch checks off by itself.
JSON_STYLE = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}


class Grammars:
    """Makes grammars for one tokenizer.

    Raises MissingPackageError without llguidance.
    """

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        """vocab_size: of the model, which may have more tokens than the tokenizer."""
        self._package = _llguidance()
        wrapped = self._package.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
        self._tokenizer = self._package.LLTokenizer(
            wrapped, n_vocab=vocab_size, eos_token=list(tokenizer.stop_tokens)
        )

    def schema(self, schema: Any) -> Grammar:
        """JSON that is valid by a schema.

        schema: a JSON Schema as a dict or as True (any JSON), or a pydantic model.

        Raises ArgumentError, by name, for keywords that cannot be enforced.
        """
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        schema = {} if schema is True else schema
        if not isinstance(schema, Mapping):
            raise ArgumentError(f"schema must be a JSON Schema (a dict) or a pydantic model, not {schema!r}")
        try:
            text = json.dumps(schema)
            grammar = self._package.LLMatcher.grammar_from_json_schema(text, overrides=JSON_STYLE)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"schema is not a JSON Schema: {error}") from None
        return self._grammar("schema", grammar)

    def regex(self, regex: str) -> Grammar:
        """Text that a regular expression matches as a whole.

        regex: in the syntax of Rust's regex crate: no look-around, no back references.

        Raises ArgumentError if it is not valid.
        """
        if not isinstance(regex, str):
            raise ArgumentError(f"regex must be a string, not {regex!r}")
        return self._grammar("regex", self._package.LLMatcher.grammar_from_regex(regex))

    def lark(self, grammar: str) -> Grammar:
        """Text of a context-free grammar.

        grammar: in llguidance's variant of Lark's syntax; the rule to begin with is `start`.

        Raises ArgumentError if it is not valid.
        """
        if not isinstance(grammar, str):
            raise ArgumentError(f"grammar must be the text of a Lark grammar, not {grammar!r}")
        return self._grammar("grammar", self._package.LLMatcher.grammar_from_lark(grammar))

    def read(self, text: str) -> Grammar:
        """A grammar by the text of another, which may be that of another process."""
        return self._grammar("grammar", text)

    def _grammar(self, name: str, grammar: str) -> Grammar:
        matcher = self._package.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ArgumentError(f"this {name} cannot constrain an answer: {matcher.get_error().strip()}")
        begun = matcher.deep_copy()
        begun.compute_logit_bias()
        if begun.is_error():
            reason = begun.get_error().partition("\n")[0]
            reason = "no text fits it" if reason == "NoExtensionBias" else reason
            raise ArgumentError(f"this {name} cannot constrain an answer: {reason}")
        return Grammar(matcher, grammar)


class Grammar:
    """A grammar that is known to be valid, for any number of answers.

    text: which `Grammars.read` reads.
    """

    def __init__(self, matcher: Any, text: str) -> None:
        self._matcher = matcher
        self.text = text

    def begin(self) -> GrammarConstraint:
        """A constraint for one answer."""
        return GrammarConstraint(self._matcher.deep_copy(), self.text)


class GrammarConstraint:
    """Keeps one answer within a grammar; see `Constraint` in `llama.sampling`.

    It keeps its place in the grammar, and goes on, or back, to where an answer has got to. If llguidance
    gives up, because the grammar takes too much work, it forbids every token.

    text: of the grammar.
    """

    def __init__(self, matcher: Any, text: str) -> None:
        self._matcher = matcher
        self.text = text
        self._consumed: list[int] = []

    def mask(self, answer: Sequence[int], logits: Tensor) -> None:
        """Set the logits, fp32 (vocab_size), of tokens that must not follow to -inf, in place."""
        self._go_to(answer)
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            allowed.zero_()
        logits.masked_fill_(allowed.to(logits.device) == 0, -torch.inf)

    def forced(self, answer: Sequence[int]) -> list[int]:
        """The tokens that must follow whatever the model says; none if it has a choice."""
        self._go_to(answer)
        return list(self._matcher.compute_ff_tokens())

    def finished(self, answer: Sequence[int]) -> bool:
        """Whether nothing may follow."""
        self._go_to(answer)
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def _go_to(self, answer: Sequence[int]) -> None:
        common = len(self._consumed)
        if list(answer[:common]) != self._consumed:
            common = next(
                (n for n, (a, b) in enumerate(zip(answer, self._consumed, strict=False)) if a != b),
                min(len(answer), common),
            )
            self._matcher.rollback(len(self._consumed) - common)
        following = list(answer[common:])
        if following:
            self._matcher.consume_tokens(following)
        self._consumed[common:] = following


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        known = min(vocab_size, tokenizer.n_words)
        # Ids of the model that no text has are special tokens, which no grammar allows.
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(known)]
        self.tokens += [b"<|unused_%d|>" % i for i in range(known, vocab_size)]
        unused = [i for i, token in enumerate(self.tokens) if not token or i >= known]
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *tokenizer.stop_tokens, *unused})

    def __call__(self, text: str) -> list[int]:
        """Ids of a text in the middle of an answer."""
        ids = self._encode(text)
        if self._tokenizer.decode_bytes(ids) != text.encode("utf-8", "replace"):
            # sentencepiece puts a space before the first word of what it takes for a whole text.
            ids = self._encode("\n" + text)[len(self._encode("\n")) :]
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, bos=False, eos=False)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingPackageError(
            "schema, regex, grammar and a required tool need the llguidance package: "
            "pip install -e '.[tools]'"
        ) from None
    return llguidance
