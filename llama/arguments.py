"""From the arguments of a call to requests: names, types and ranges, checked before anything runs.

Token ids may come in lists, tuples, NumPy arrays or tensors, and numbers may be NumPy's.
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
LIMITS = ("max_gen_len", "max_tokens", "max_new_tokens")  # three names for the same limit


class Sampling(TypedDict, total=False):
    """Keyword arguments of every call, besides the parameters in its signature.

    n: answers per prompt; they are adjacent in the results.
    seed: a whole number from which the seeds of a prompt's answers are derived (the first answer uses
        it as is); a list with one seed per answer; or None to derive seeds from `build`'s.
    stop: string or strings that end an answer and are not part of it. A token may extend beyond a stop
        string, so the returned ids include the tokens in which it was found.
    stop_token_ids: ids that end an answer, besides the tokenizer's own.
    max_tokens, max_new_tokens: other names for max_gen_len.
    images: for each prompt of token ids, one image per image token (whose id is the model's
        vocab_size). In texts and messages, images are parts of the content.
    schema: a JSON Schema (a dict) or a pydantic model that the answer must match.
    regex: a regular expression that must match the whole answer.
    grammar: a grammar in Lark syntax that the answer must follow.
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
    """Additional keyword arguments of calls with dialogs.

    tools: what the model may call: OpenAI function objects, Python functions, or the names of Meta's
        built-in tools ("brave_search", "wolfram_alpha", "photogen", "code_interpreter").
    tool_choice: "auto"; "none"; "required" to force a call; or {"name": …} to force that one.
    tool_format: how the prompt describes tools: "template" for the checkpoint's own way, or a name in
        `llama.tools.FORMATS`; by default the format the checkpoint was trained with.
    parallel_tool_calls: False ends an answer after its first call.
    guard: checks the user's last message before it is answered, and the answer before it is shown; see
        `llama.Guard`.
    guard_every: interval in tokens at which to check an answer and release what is safe; by default it is
        checked once, at its end.
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
    """In the signatures of calls that return answers; keyword arguments of the others.

    temperature, top_p: see `SamplingParams`.
    max_gen_len: maximum number of new tokens, within max_seq_len; None for as many as fit; 0, with
        logprobs and echo, scores the prompts.
    logprobs: return each token's log-probability under the raw logits (0 for a prompt's first token).
    echo: include the prompt before its answer.
    """

    temperature: float
    top_p: float
    max_gen_len: int | None
    logprobs: bool
    echo: bool


class Options(Sampling, Basic, total=False):
    """`Sampling` and `Basic`: everything a call takes besides its prompts."""


class ChatOptions(Options, DialogOptions, total=False):
    """`Options` and `DialogOptions`."""


@dataclass(frozen=True)
class TextRequest:
    """A request to the engine, and how to process its tokens.

    prompt: token ids.
    images: one for each image token of the prompt.
    stop: strings that end the text and are not part of it.
    echo: whether to include the prompt before the answer.
    constraint: restricts its tokens.
    tools: finds tool calls in the text; None if there are none.
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
    check: raises ArgumentError for a request that the engine cannot run.
    next_seed: returns the seed of an answer without one.
    grammars: compiles schema, regex and grammar to constraints.
    images: for each prompt; none by default.

    Raises PromptError for an invalid prompt, ArgumentError for invalid options.
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
    """A NumPy number or one-element tensor as a Python number; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def entries(values: Any, what: str) -> list[Any]:
    """All entries of a list or iterator. Raises ArgumentError if it is not one, or is empty."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ArgumentError(
            f"{what} must be a list, one entry per request, not a single {type(values).__name__}"
        )
    if not (found := list(values)):
        raise ArgumentError(f"no {what}: pass at least one")
    return found


def token_ids(values: Any, what: str, error: type[ArgumentError] = ArgumentError) -> list[int]:
    """Token ids as a list of int. Raises `error` if they are not a sequence of whole numbers."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise error(f"{what} must be a list of token ids, not {values!r}")
    ids = values.tolist() if hasattr(values, "tolist") else [plain(value) for value in values]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise error(f"{what}: {token!r} is not a token id, which is a whole number")
    return ids


def whole(name: str, value: Any, least: float = -math.inf) -> int:
    """A whole number, Python's or NumPy's. Raises ArgumentError for anything else."""
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        bound = "" if least == -math.inf else f", {least} or more"
        raise ArgumentError(f"{name} must be a whole number{bound}, not {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False, Python's or NumPy's. Raises ArgumentError for anything else."""
    if not isinstance(value := plain(value), bool):
        raise ArgumentError(f"{name} must be True or False, not {value!r}")
    return value


def _limit(values: dict[str, Any]) -> int | None:
    """Remove the limit on new tokens from the options, under whichever name the caller used."""
    given = {name: values.pop(name) for name in LIMITS if name in values}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(given)} are names for the same limit: pass only one")
    return next((whole(name, value, 0) for name, value in given.items()), None)


def _grammar(shapes: Mapping[str, Any], grammars: Callable[[], Grammars]) -> Grammar | None:
    """The grammar for schema, regex or grammar. Raises ArgumentError if more than one is given."""
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
