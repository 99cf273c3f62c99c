"""A conversation's turns, and the ids they make: answers as they were generated, never encoded anew."""

import json
from dataclasses import dataclass, field

from llama.errors import ArgumentError
from llama.generation import Llama
from llama.tokenizer import Message


@dataclass(frozen=True)
class Turn:
    """A message, and the ids of the answer as they were generated."""

    message: str
    answer: list[int]


@dataclass
class Conversation:
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def prompt(self, llama: Llama, message: str, skip: int = 0) -> list[int]:
        """The ids that ask for the answer to a message that follows all turns but the first `skip`."""
        turns = self.turns[skip:]
        messages = [*(turn.message for turn in turns), message]
        opening: list[Message] = [{"role": "user", "content": messages[0]}]
        if self.system:
            opening.insert(0, {"role": "system", "content": self.system})
        ids = llama.formatter.encode_dialog_prompt(opening)
        for turn, following in zip(turns, messages[1:], strict=True):
            ids += [*turn.answer, *llama.formatter.encode_next_turn(following)]
        return ids

    def dump(self, llama: Llama) -> str:
        turns = [
            {"user": turn.message, "assistant": llama.tokenizer.decode(turn.answer), "ids": turn.answer}
            for turn in self.turns
        ]
        return json.dumps({"system": self.system, "turns": turns}, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def parse(text: str, llama: Llama) -> "Conversation":
        """What `dump` wrote; answers of a model with another tokenizer are encoded anew.

        Raises ValueError for another kind of text.
        """
        try:
            data = json.loads(text)
            saved = [(turn["user"] + "", turn["assistant"] + "", turn["ids"]) for turn in data["turns"]]
            return Conversation(
                data["system"] + "", [Turn(user, _answer_ids(llama, *answer)) for user, *answer in saved]
            )
        except (ValueError, KeyError, TypeError):
            raise ArgumentError("this is not a conversation that /save wrote") from None


def _answer_ids(llama: Llama, text: str, ids: list[int]) -> list[int]:
    try:
        if llama.tokenizer.decode(ids) == text:
            return ids
    except ValueError:  # an id that this tokenizer has not
        pass
    return llama.tokenizer.encode(text, bos=False, eos=False)
