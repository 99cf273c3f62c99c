"""Dialogs with tools to token ids, for models with Meta's own chat formats.

A message's text never becomes a special token here either: only headers, ends and <|python_tag|> do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from llama.errors import ArgumentError
from llama.tokenizer import TextTokenizer
from llama.tokenizer.chat_format import parse_call
from llama.tools.definitions import BUILTIN_TOOLS, Tool
from llama.tools.formats import ToolFormat, write_builtin

# Names of special tokens: begin of text, before and after a role, end of turn, end of message (a tool's
# result is expected), before and after text meant for a tool only.
LLAMA_3 = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "",
)
LLAMA_4 = (
    "<|begin_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|eom|>",
    "<|python_start|>",
    "<|python_end|>",
)


@dataclass(frozen=True)
class Turn:
    """One message of the prompt.

    role: as in the header.
    text: exact; it is not stripped any further.
    calls: whether it calls a tool, and so ends with the token that requests a result.
    tagged: whether it comes after <|python_tag|>.
    """

    role: str
    text: str
    calls: bool = False
    tagged: bool = False


def encode_turns(turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[int]:
    """Begin of text, every turn, and the header of the assistant's next one."""
    special = tokenizer.special_tokens
    names = LLAMA_4 if LLAMA_4[1] in special else LLAMA_3
    begin, start, end, eot, eom, tag, untag = (special[name] if name else None for name in names)

    def text(s: str) -> list[int]:
        return tokenizer.encode(s, bos=False, eos=False)

    ids = [begin]
    for turn in turns:
        body = text(turn.text)
        ids += [start, *text(turn.role), end, *text("\n\n")]
        ids += [tag, *body, untag] if turn.tagged else body
        ids.append(eom if turn.calls else eot)
    ids += [start, *text("assistant"), end, *text("\n\n")]
    return [token for token in ids if token is not None]


def render(
    dialog: Sequence[Mapping[str, Any]], tools: Sequence[Tool], form: ToolFormat, today: date
) -> list[Turn]:
    """The turns of a dialog, with a description of the tools.

    dialog: checked messages; the assistant's may have "tool_calls", those of role "tool" a
    "tool_call_id".
    today: the date in Llama 3.1's system message.

    Raises ArgumentError if calls and results do not match, or if there is no user message to put the
    tools in.
    """
    messages = list(dialog)
    custom = [tool for tool in tools if not tool.builtin]
    builtin = [tool.name for tool in tools if tool.builtin]
    system = messages.pop(0)["content"].strip() if messages and messages[0]["role"] == "system" else ""
    turns = []
    if form.place == "system" and custom:
        system = form.fill(custom) + ("\n" + system if system else "")
    elif tools and form.place == "user":
        system = system_3_1(builtin, system, today)
    elif builtin:
        raise ArgumentError(
            f"tool_format {form.name!r} does not support built-in tools; use tool_format='json'"
        )
    if system:
        turns.append(Turn("system", system))
    question = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if custom and form.place != "system":
        if question is None:
            raise ArgumentError("tools need a user message in the dialog")
        text = form.fill(custom, messages[question]["content"].strip())
        if form.place == "user":
            messages.insert(question, {"role": "user", "content": text})
        else:
            messages[question] = {"role": "user", "content": text}
    return turns + _history(messages, form, [tool.name for tool in custom])


def system_3_1(builtin: Sequence[str], instruction: str, today: date) -> str:
    """Llama 3.1's system message with tools: environment, built-in tools, dates, the user's instruction."""
    listed = [name for name in builtin if name != "code_interpreter"]  # implied by the environment
    lines = ["Environment: ipython", f"Tools: {', '.join(listed)}" if listed else ""]
    lines += ["Cutting Knowledge Date: December 2023", f"Today Date: {today:%d %B %Y}"]
    return "\n".join(lines) + (f"\n\n{instruction}" if instruction else "") + "\n"


def _history(messages: Sequence[Mapping[str, Any]], form: ToolFormat, custom: Collection[str]) -> list[Turn]:
    turns: list[Turn] = []
    for message in ordered(messages) if form.parallel else one_call_each(messages):
        content = (message.get("content") or "").strip()
        calls = [parse_call(call) for call in message.get("tool_calls") or ()]
        if calls:
            name, arguments = calls[0]
            tagged = len(calls) == 1 and name in BUILTIN_TOOLS and name not in custom
            text = write_builtin(name, arguments) if tagged else form.write(calls)
            turns.append(Turn("assistant", content + text, calls=True, tagged=tagged))
        elif message["role"] in ("tool", "ipython"):
            turns.append(Turn("ipython", message["content"]))
        else:
            turns.append(Turn(message["role"], content))
    return turns


def ordered(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A dialog in which tool results are in the order of the calls."""
    return [one for message, results in pair_results(messages) for one in (message, *results)]


def one_call_each(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A dialog in which each message has at most one tool call, followed by its result."""
    split: list[Any] = []
    for message, results in pair_results(messages):
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            split += [message, *results]
            continue
        for i, call in enumerate(calls):
            split.append(
                {**message, "content": message.get("content") if i == 0 else None, "tool_calls": [call]}
            )
            split += results[i:] if i == len(calls) - 1 else results[i : i + 1]
    return split


def pair_results(
    messages: Sequence[Mapping[str, Any]],
) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Each message with the tool results that follow it, in the order of its calls.

    Raises ArgumentError for a result of an unknown call, or for more results than calls.
    """
    paired: list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]] = []
    for message in messages:
        calls = paired[-1][0].get("tool_calls") if paired else None
        if message["role"] in ("tool", "ipython") and calls:
            paired[-1][1].append(message)
        else:
            paired.append((message, []))
    for message, results in paired:
        if not results:
            continue
        calls = message["tool_calls"]
        order = {call.get("id"): i for i, call in enumerate(calls)}
        named = [result["tool_call_id"] for result in results if result.get("tool_call_id") is not None]
        if missing := [name for name in named if name not in order]:
            raise ArgumentError(
                f"a tool message answers call {missing[0]!r}, but the assistant's message before it has "
                f"{', '.join(repr(name) for name in order)}"
            )
        if len(results) > len(calls) or len(set(named)) < len(named):
            raise ArgumentError(f"{len(results)} tool messages follow a message with {len(calls)} tool calls")
        if len(named) == len(results):
            results.sort(key=lambda result: order[result["tool_call_id"]])
    return paired
