"""Constrained answers: JSON Schemas, regular expressions and Lark grammars, with the llguidance package.

A grammar determines which tokens may follow; the others are masked before one is chosen. Nothing is
compiled in advance, and nothing here runs the model: see `Constraint` in `llama.sampling`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llama.errors import ArgumentError, MissingPackageError
from llama.tokenizer import TextTokenizer

# JSON as Python and the models write it. With only one way to write a value, more tokens are forced and
# no model can emit white space forever. A schema must not be able to switch checks off.
JSON_STYLE = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}


class Grammars:
    """Compiles grammars for one tokenizer.

    Raises MissingPackageError if llguidance is not installed.
    """

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        """vocab_size: of the model, which may have more tokens than the tokenizer."""
        self._package = _llguidance()
        wrapped = self._package.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
        self._tokenizer = self._package.LLTokenizer(
            wrapped, n_vocab=vocab_size, eos_token=list(tokenizer.stop_tokens)
        )

    def schema(self, schema: Any) -> Grammar:
        """JSON that is valid against a schema.

        schema: a JSON Schema as a dict or as True (any JSON), or a pydantic model.

        Raises ArgumentError, naming the keyword, if one cannot be enforced.
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
        """Text that a regular expression matches in full.

        regex: in the syntax of Rust's regex crate: no look-around, no backreferences.

        Raises ArgumentError if it is not valid.
        """
        if not isinstance(regex, str):
            raise ArgumentError(f"regex must be a string, not {regex!r}")
        return self._grammar("regex", self._package.LLMatcher.grammar_from_regex(regex))

    def lark(self, grammar: str) -> Grammar:
        """Text of a context-free grammar.

        grammar: in llguidance's variant of Lark's syntax; the first rule is `start`.

        Raises ArgumentError if it is not valid.
        """
        if not isinstance(grammar, str):
            raise ArgumentError(f"grammar must be the text of a Lark grammar, not {grammar!r}")
        return self._grammar("grammar", self._package.LLMatcher.grammar_from_lark(grammar))

    def read(self, text: str) -> Grammar:
        """A grammar from another grammar's `text`, possibly from another process."""
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
    """A valid grammar, for any number of answers.

    text: its serialised form, for `Grammars.read`.
    """

    def __init__(self, matcher: Any, text: str) -> None:
        self._matcher = matcher
        self.text = text

    def begin(self) -> GrammarConstraint:
        """A constraint for one answer."""
        return GrammarConstraint(self._matcher.deep_copy(), self.text)


class GrammarConstraint:
    """Keeps one answer within a grammar; see `Constraint` in `llama.sampling`.

    It remembers its position in the grammar and moves forward or back to follow an answer. If llguidance
    gives up because the grammar takes too much work, every token is forbidden.

    text: the grammar's.
    """

    def __init__(self, matcher: Any, text: str) -> None:
        self._matcher = matcher
        self.text = text
        self._consumed: list[int] = []

    def mask(self, answer: Sequence[int], logits: Tensor) -> None:
        """Set the logits, fp32 (vocab_size), of disallowed tokens to -inf, in place."""
        self._go_to(answer)
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            allowed.zero_()
        logits.masked_fill_(allowed.to(logits.device) == 0, -torch.inf)

    def forced(self, answer: Sequence[int]) -> list[int]:
        """The tokens that must follow, whatever the logits; empty if the model has a choice."""
        self._go_to(answer)
        return list(self._matcher.compute_ff_tokens())

    def finished(self, answer: Sequence[int]) -> bool:
        """Whether the answer is complete."""
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
    """A tokenizer with the interface that llguidance expects."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        known = min(vocab_size, tokenizer.n_words)
        # Model ids that the tokenizer does not know become special tokens, which no grammar allows.
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(known)]
        self.tokens += [b"<|unused_%d|>" % i for i in range(known, vocab_size)]
        unused = [i for i, token in enumerate(self.tokens) if not token or i >= known]
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *tokenizer.stop_tokens, *unused})

    def __call__(self, text: str) -> list[int]:
        """Token ids of text within an answer."""
        ids = self._encode(text)
        if self._tokenizer.decode_bytes(ids) != text.encode("utf-8", "replace"):
            # sentencepiece adds a space before the first word of what it regards as a whole text.
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
