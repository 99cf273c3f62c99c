"""A conversation's turns and their token ids: answers keep their generated ids, and are not re-encoded."""

import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field

from llama.errors import ArgumentError
from llama.generation import Llama
from llama.prompts import with_image_token
from llama.tokenizer import Message


@dataclass(frozen=True)
class Turn:
    """A message, and the ids of its answer as they were generated.

    images: of the message, as bytes of image files; they come before its text
    """

    message: str
    answer: list[int]
    images: tuple[bytes, ...] = ()


@dataclass
class Conversation:
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def prompt(self, llama: Llama, message: str, skip: int = 0, images: Sequence[bytes] = ()) -> list[int]:
        """The ids that prompt for an answer to a message after all turns but the first `skip`.

        images: of the message
        """
        turns = self.turns[skip:]
        messages = [
            _content(turn.message, turn.images) for turn in [*turns, Turn(message, [], tuple(images))]
        ]
        opening: list[Message] = [{"role": "user", "content": messages[0]}]
        if self.system:
            opening.insert(0, {"role": "system", "content": self.system})
        ids = llama.formatter.encode_dialog_prompt(opening)
        for turn, following in zip(turns, messages[1:], strict=True):
            ids += [*turn.answer, *llama.formatter.encode_next_turn(following)]
        seen = self.images(skip) or images
        return with_image_token(ids, llama.model, llama.tokenizer) if seen else ids

    def images(self, skip: int = 0) -> list[bytes]:
        """The images of all turns but the first `skip`."""
        return [image for turn in self.turns[skip:] for image in turn.images]

    def dump(self, llama: Llama) -> str:
        turns = [
            {
                "user": turn.message,
                "assistant": llama.tokenizer.decode(turn.answer),
                "ids": turn.answer,
                **({"images": [b64encode(image).decode() for image in turn.images]} if turn.images else {}),
            }
            for turn in self.turns
        ]
        return json.dumps({"system": self.system, "turns": turns}, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def parse(text: str, llama: Llama) -> "Conversation":
        """Read what `dump` wrote; answers of a model with another tokenizer are re-encoded.

        Raises ValueError for any other text.
        """
        try:
            data = json.loads(text)
            turns = [
                Turn(
                    turn["user"] + "",
                    _answer_ids(llama, turn["assistant"] + "", turn["ids"]),
                    tuple(b64decode(image, validate=True) for image in turn.get("images", ())),
                )
                for turn in data["turns"]
            ]
            return Conversation(data["system"] + "", turns)
        except (ValueError, KeyError, TypeError):
            raise ArgumentError("this is not a conversation written by /save") from None


def _content(message: str, images: Sequence[bytes]) -> str | list[dict[str, str]]:
    """A message in the form that chat formats accept."""
    return [*({"type": "image"} for _ in images), {"type": "text", "text": message}] if images else message


def _answer_ids(llama: Llama, text: str, ids: list[int]) -> list[int]:
    try:
        if llama.tokenizer.decode(ids) == text:
            return ids
    except ValueError:  # an id that this tokenizer does not have
        pass
    return llama.tokenizer.encode(text, bos=False, eos=False)
