"""What each Llama Guard was trained to read and to write.

The texts in `prompts/` match the models' own templates byte for byte, with slots for the categories, the
conversation and the judged role. Only their own special tokens are encoded as such, never a message's text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llama.errors import ArgumentError
from llama.moderation import Category
from llama.tokenizer import TextTokenizer
from llama.tokenizer.content import IMAGE

PROMPTS = Path(__file__).with_name("prompts")
SPECIAL = re.compile(r"(<\|[a-z_]+\|>)")
BEGIN = re.compile(r"<BEGIN UNSAFE ?CONTENT CATEGORIES>\n")  # without the space in Llama Guard 3 11B Vision
END = "<END UNSAFE CONTENT CATEGORIES>"
CATEGORY = re.compile(r"^([OS]\d+): ", re.M)

Judged = Literal["user", "assistant"]


@dataclass(frozen=True)
class GuardVersion:
    """One generation of Llama Guard.

    name: the value for `Guard.build(version=…)`.
    file: its prompt in `prompts/`.
    answer_prefix: what it writes before its verdict.
    turn_end: what follows each turn of the conversation, before a blank line.
    agent: what it calls the assistant.
    sees: whether an image may precede the task.
    """

    name: str
    file: str
    answer_prefix: str = "\n\n"
    turn_end: str = ""
    agent: str = "Agent"
    sees: bool = False

    @cached_property
    def template(self) -> str:
        return (PROMPTS / self.file).read_bytes().decode()

    @cached_property
    def categories(self) -> dict[str, str]:
        """Codes and the text of each: a name and, in Llama Guard 1, the policy below it."""
        block = BEGIN.split(self.template)[1].partition(END)[0]
        _, *parts = CATEGORY.split(block)
        return {code: text.removesuffix("\n") for code, text in zip(parts[::2], parts[1::2], strict=True)}

    def render(
        self,
        dialog: Sequence[Mapping[str, Any]],
        categories: Mapping[str, str] | None = None,
        excluded: Collection[str] = (),
        image: bool = False,
    ) -> list[str]:
        """The prompt as a list of special tokens (which match `SPECIAL`) and ordinary text.

        dialog: alternating messages of user and assistant; the last one is judged.
        categories: codes and texts, instead of the model's own.
        excluded: codes that are left out.
        image: whether an image precedes the task.

        Raises ArgumentError for invalid dialogs or unknown codes.
        """
        names = {"user": "User", "assistant": self.agent}
        judged = names[check_conversation(dialog)]
        categories = self.categories if categories is None else categories
        if unknown := sorted(set(excluded) - set(categories)):
            raise ArgumentError(
                f"{unknown[0]!r} is not a category of Llama Guard {self.name}; "
                f"its categories are {', '.join(categories)}"
            )
        listed = "".join(f"{code}: {text}\n" for code, text in categories.items() if code not in excluded)
        turns = "\n\n".join(
            f"{names[message['role']]}: {message['content'].strip()}{self.turn_end}" for message in dialog
        )
        template = self.template if image else re.sub(rf"{re.escape(IMAGE)} ?", "", self.template)
        parts = SPECIAL.split(template)
        frame = next(i for i, part in enumerate(parts) if BEGIN.search(part))
        before, rest = BEGIN.split(parts[frame])
        begin = parts[frame][len(before) : -len(rest)]
        between, after = rest.partition(END)[2].split("{turns}")
        turns += "" if after.startswith("\n\n") else "\n\n"
        parts[frame] = before.replace("{role}", judged) + begin + listed + END + between
        parts[frame] += turns + after.replace("{role}", judged)
        return [part for part in parts if part]

    def encode(
        self,
        tokenizer: TextTokenizer,
        dialog: Sequence[Mapping[str, Any]],
        categories: Mapping[str, str] | None = None,
        excluded: Collection[str] = (),
        image: bool = False,
    ) -> list[int]:
        """Token ids of what `render` returns, up to where the verdict begins."""
        ids: list[int] = []
        for part in self.render(dialog, categories, excluded, image):
            # The part with the messages is never a special token as a whole.
            if SPECIAL.fullmatch(part):
                ids.append(tokenizer.special_tokens[part])
            else:
                ids += tokenizer.encode(part, bos=False, eos=False)
        return ids


VERSIONS = {
    version.name: version
    for version in (
        GuardVersion("1", "guard1.txt", answer_prefix=""),
        GuardVersion("2", "guard2.txt", answer_prefix=""),
        GuardVersion("3-8b", "guard3.txt"),
        GuardVersion("3-1b", "guard3-1b.txt"),
        GuardVersion("3-11b-vision", "guard3-11b-vision.txt", sees=True),
        # The same model with Llama Stack's prompt.
        GuardVersion("3-11b-vision-stack", "guard3-11b-vision-stack.txt", agent="Assistant", sees=True),
        GuardVersion("4", "guard4.txt", turn_end="\\n\\n"),
    )
}


def guard_version(name: str) -> GuardVersion:
    """A version by name. Raises ArgumentError for an unknown one."""
    if name not in VERSIONS:
        raise ArgumentError(f"unknown version {name!r} of Llama Guard; use one of {', '.join(VERSIONS)}")
    return VERSIONS[name]


def check_conversation(dialog: Sequence[Mapping[str, Any]]) -> Judged:
    """Whose message is last. Raises ArgumentError unless user and assistant alternate, in text only."""
    if isinstance(dialog, str | Mapping) or not isinstance(dialog, Sequence) or not dialog:
        raise ArgumentError(f"a guard checks a dialog, a list of messages; got {dialog!r}")
    for i, message in enumerate(dialog):
        expected: Judged = "assistant" if i % 2 else "user"
        if not isinstance(message, Mapping) or message.get("role") != expected:
            raise ArgumentError(
                "a guard checks alternating user and assistant messages, starting with the user; "
                f"message {i} must be the {expected}'s, got {message!r}"
            )
        if not isinstance(message.get("content"), str):
            raise ArgumentError(f"message {i} must have text as its content, got {message.get('content')!r}")
    return expected


def parse_verdict(text: str, categories: Mapping[str, str]) -> tuple[bool, tuple[Category, ...]]:
    """Whether an answer says "safe" and, if not, the categories on its second line.

    Anything else a model writes counts as unsafe.
    """
    first, _, rest = text.strip().partition("\n")
    if first.strip() == "safe":
        return True, ()
    codes = [code.strip() for code in rest.partition("\n")[0].split(",") if code.strip()]
    return False, tuple(Category(code, category_name(categories.get(code, code))) for code in codes)


def category_name(text: str) -> str:
    """The first line of a category's text, without the full stop."""
    return text.partition("\n")[0].strip().removesuffix(".")
