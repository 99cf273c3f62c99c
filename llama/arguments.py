"""From the arguments of a call to requests: names, types and ranges, checked before anything runs.

Callers have token ids in lists, tuples, NumPy arrays or tensors, and NumPy numbers for numbers.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, TypedDict

from llama.constraints import Grammar, Grammars
from llama.errors import ArgumentError, PromptError
from llama.moderation import Moderator, Review
from llama.noise import derive_seed
from llama.sampling import Constraint, SamplingParams
from llama.tools.parser import ToolParser
from llama.vision import ImageSource, TiledImage

SHAPES = ("schema", "regex", "grammar")
LIMITS = ("max_gen_len", "max_tokens", "max_new_tokens")  # three names of one limit


class Sampling(TypedDict, total=False):
    """What every call takes by keyword, besides the parameters of its signature.

    n: answers for each prompt, one after the other in the results.
    seed: a whole number, from which all answers of a prompt get their seeds (the first one this
        itself); a list with a seed for each answer; or None: seeds that follow from `build`'s.
    stop: text that ends an answer and is not part of it, or several; a token may hold more than a stop
        string, so ids include the tokens in which it was found.
    stop_token_ids: end an answer, besides the tokenizer's own.
    max_tokens, max_new_tokens: other names for max_gen_len.
    images: of each prompt of token ids, one for each image token, whose id is the model's vocab_size.
        In texts and messages they are parts of the content.
    schema: a JSON Schema (a dict) or a pydantic model that the answer must fit.
    regex: a regular expression that must match the whole answer.
    grammar: a grammar in Lark's syntax that the answer must follow.
    The rest: see `SamplingParams`.
    """

    n: int
    seed: int | Sequence[int] | None
    stop: str | Sequence[str]
    stop_token_ids: Iterable[int]
    max_tokens: int | None
    max_new_tokens: int | None
    top_k: int | None
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    top_logprobs: int
    images: Sequence[Sequence[ImageSource]]
    schema: Any
    regex: str
    grammar: str


class DialogOptions(TypedDict, total=False):
    """What calls with dialogs take besides.

    tools: what the model may call: OpenAI function objects, Python functions, or the names of Meta's
        built-in tools ("brave_search", "wolfram_alpha", "photogen", "code_interpreter").
    tool_choice: "auto"; "none"; "required", to call one in any case; or {"name": …}, to call that one.
    tool_format: how the prompt tells of tools: "template", the checkpoint's own, or a name in
        `llama.tools.FORMATS`; by default what the checkpoint was trained with.
    parallel_tool_calls: False ends an answer after its first call.
    guard: checks the user's last message before it is answered, and the answer before it is shown; see
        `llama.Guard`.
    guard_every: check an answer whenever it has this many tokens more, and show what is safe of it; by
        default once, at its end.
    """

    tools: Sequence[Any] | None
    tool_choice: str | Mapping[str, Any]
    tool_format: str | None
    parallel_tool_calls: bool
    guard: Moderator | None
    guard_every: int | None


class ChatSampling(Sampling, DialogOptions, total=False):
    """`Sampling` and `DialogOptions`."""


class Basic(TypedDict, total=False):
    """What the calls that return answers have in their signatures, and others take by keyword.

    temperature, top_p: see `SamplingParams`.
    max_gen_len: new tokens at most, within max_seq_len; None for as many as fit; 0 scores the prompts,
        with logprobs and echo.
    logprobs: give the log-probability of each token under the raw logits (0 for a prompt's first).
    echo: put the prompt in front of its answer.
    """

    temperature: float
    top_p: float
    max_gen_len: int | None
    logprobs: bool
    echo: bool


class Options(Sampling, Basic, total=False):
    """`Sampling` and `Basic`: all that a call takes besides its prompts."""


class ChatOptions(Options, DialogOptions, total=False):
    """`Options` and `DialogOptions`."""


@dataclass(frozen=True)
class TextRequest:
    """A request to the engine, and what is to be done with its tokens.

    prompt: token ids.
    images: one for each image token of the prompt.
    stop: strings that end the text and are not part of it.
    echo: whether the prompt stands in front of the answer.
    constraint: what its tokens must keep to.
    tools: finds tool calls in the text; None: all of it is text.
    review: how a guard checks it.
    """

    prompt: list[int]
    params: SamplingParams
    stop: Sequence[str] = ()
    echo: bool = False
    images: Sequence[TiledImage] = ()
    constraint: Constraint | None = None
    tools: ToolParser | None = None
    review: Review | None = None


def text_requests(
    prompts: Iterable[Iterable[int]],
    options: Mapping[str, Any],
    stop_tokens: Iterable[int],
    check: Callable[[list[int], SamplingParams, Sequence[TiledImage]], None],
    next_seed: Callable[[], int],
    grammars: Callable[[], Grammars],
    images: Sequence[Sequence[TiledImage]] = (),
) -> list[TextRequest]:
    """The `n` requests of each prompt, in order.

    options: see `Options`.
    stop_tokens: the tokenizer's own.
    check: raises ArgumentError for what the engine cannot run.
    next_seed: the seed of an answer that brings none.
    grammars: makes constraints of schema, regex and grammar.
    images: of each prompt; none by default.

    Raises PromptError for a prompt that nothing can follow, ArgumentError for the options.
    """
    values = {name: plain(value) for name, value in options.items()}
    known = list(Options.__annotations__)
    if unknown := next((name for name in values if name not in known), None):
        near = get_close_matches(unknown, known, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ArgumentError(f"unknown argument {unknown!r}{meant}; use one of {', '.join(known)}")
    ids = [
        token_ids(prompt, f"prompt {i}", PromptError) for i, prompt in enumerate(entries(prompts, "prompts"))
    ]
    n, seed = whole("n", values.pop("n", 1), 1), values.pop("seed", None)
    logprobs, echo = (flag(name, values.pop(name, False)) for name in ("logprobs", "echo"))
    stop, more = _stop_strings(values.pop("stop", ())), values.pop("stop_token_ids", ())
    if isinstance(bias := values.get("logit_bias"), Mapping):
        values["logit_bias"] = {plain(token): plain(value) for token, value in bias.items()}
    grammar = _grammar({name: values.pop(name, None) for name in SHAPES}, grammars)
    params = SamplingParams(
        max_tokens=_limit(values),
        logprobs=logprobs,
        prompt_logprobs=logprobs and echo,
        stop_token_ids=frozenset((*stop_tokens, *token_ids(more, "stop_token_ids"))),
        **values,
    )
    images = images or [()] * len(ids)
    if len(images) != len(ids):
        raise ArgumentError(f"images has {len(images)} entries, but there are {len(ids)} prompts")
    for i, prompt in enumerate(ids):
        try:
            check(prompt, params, images[i])
        except ArgumentError as error:
            raise type(error)(f"prompt {i}: {error}") from None
    seeds = _seeds(seed, len(ids), n, next_seed)
    return [
        TextRequest(
            ids[i // n],
            replace(params, seed=seed),
            stop,
            echo,
            images[i // n],
            constraint=grammar.begin() if grammar else None,
        )
        for i, seed in enumerate(seeds)
    ]


def plain(value: Any) -> Any:
    """Python's number for one of NumPy's or a tensor of one; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def entries(values: Any, what: str) -> list[Any]:
    """All entries of a list or iterator. Raises ArgumentError for a single thing, and for none at all."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ArgumentError(
            f"{what} must be a list, one entry per request, not a single {type(values).__name__}"
        )
    if not (found := list(values)):
        raise ArgumentError(f"no {what}: pass at least one")
    return found


def token_ids(values: Any, what: str, error: type[ArgumentError] = ArgumentError) -> list[int]:
    """Ids as a list of int. Raises `error` for what is not a sequence of whole numbers."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise error(f"{what} must be a list of token ids, not {values!r}")
    ids = values.tolist() if hasattr(values, "tolist") else [plain(value) for value in values]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise error(f"{what}: {token!r} is not a token id, which is a whole number")
    return ids


def whole(name: str, value: Any, least: float = -math.inf) -> int:
    """A whole number, NumPy's too. Raises ArgumentError for anything else."""
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        bound = "" if least == -math.inf else f", {least} or more"
        raise ArgumentError(f"{name} must be a whole number{bound}, not {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False, NumPy's too. Raises ArgumentError for anything else."""
    if not isinstance(value := plain(value), bool):
        raise ArgumentError(f"{name} must be True or False, not {value!r}")
    return value


def _limit(values: dict[str, Any]) -> int | None:
    """Take the limit of new tokens out of the options, by the name that the caller used."""
    given = {name: values.pop(name) for name in LIMITS if name in values}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(given)} are names for the same limit: pass only one")
    return next((whole(name, value, 0) for name, value in given.items()), None)


def _grammar(shapes: Mapping[str, Any], grammars: Callable[[], Grammars]) -> Grammar | None:
    """The grammar of the one shape that is given. Raises ArgumentError if there are more."""
    given = {name: shape for name, shape in shapes.items() if shape is not None}
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(given)} cannot be combined: pass only one")
    for name, shape in given.items():
        made = grammars()
        return {"schema": made.schema, "regex": made.regex, "grammar": made.lark}[name](shape)
    return None


def _stop_strings(stop: Any) -> Sequence[str]:
    stop = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, Sequence) and all(isinstance(text, str) and text for text in stop)):
        raise ArgumentError(f"stop must be a string or a list of strings, none of them empty, not {stop!r}")
    return tuple(stop)


def _seeds(seed: Any, prompts: int, n: int, next_seed: Callable[[], int]) -> list[int]:
    """The seeds of all answers."""
    if seed is None:
        return [next_seed() for _ in range(prompts * n)]
    if not isinstance(seed, Iterable) or isinstance(seed, str | bytes | Mapping):
        seed = whole("seed", seed)
        return [derive_seed(seed, k) if k else seed for _ in range(prompts) for k in range(n)]
    seeds = [whole("seed", value) for value in seed]
    if len(seeds) != prompts * n:
        raise ArgumentError(
            f"seed has {len(seeds)} entries, but there are {prompts * n} answers: pass one per answer"
        )
    return seeds
