"""The commands that talk in the terminal: a chat, and a completion."""

import ast
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire

from llama.cli.terminal import Terminal
from llama.errors import ArgumentError
from llama.generation import Llama
from llama.sampling import SamplingParams
from llama.tokenizer import Message

PARAMS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_gen_len",
    "seed",
)
HELP = """\
/system TEXT   set the system prompt; alone, show it; /system - for none
/reset         forget all turns
/retry         answer the last message again
/save FILE     write the conversation;  /load FILE  go on with one
/params        show the sampling parameters;  /params temperature=0.2 top_k=40  set some
/speed         show counts and speed after each answer, or no longer
/help          this
Ctrl-C stops an answer, Ctrl-D leaves. A backslash at the end of a line continues it."""


def chat(
    ckpt_dir: str,
    system: str = "",
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: int | None = None,
    max_seq_len: int = 4096,
    seed: int | None = None,
    speed: bool = False,
    tokenizer_path: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool | str = "auto",
) -> None:
    """Chat with a model in the terminal.

    Args:
        ckpt_dir: folder of the checkpoint.
        system: the system prompt.
        temperature: of sampling; 0 always takes the most likely token.
        top_p: share of probability that sampling keeps.
        max_gen_len: tokens of an answer at most; by default as many as fit.
        max_seq_len: tokens of the conversation at most; the oldest turns are dropped beyond.
        seed: of every answer; by default each has its own.
        speed: show counts and speed after each answer.
        tokenizer_path: by default tokenizer.model in ckpt_dir.
        device: cuda, mps or cpu; by default the best there is.
        dtype: bfloat16, float16 or float32; by default what suits the device.
        quantize: int8 or int4, or fp8 on CUDA; by default the weights as they are.
        compile: True, False or auto, which compiles on CUDA.
    """
    params = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "seed": seed}
    with Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size=1,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
    ) as llama:
        Chat(llama, Conversation(system), params, speed).run()


def complete(
    ckpt_dir: str,
    prompt: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: int | None = None,
    max_seq_len: int = 2048,
    seed: int | None = None,
    stop: str | None = None,
    tokenizer_path: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool | str = "auto",
) -> None:
    """Continue a text, and print the continuation as it comes.

    Args:
        ckpt_dir: folder of the checkpoint.
        prompt: the text; by default the standard input, without the newline at its end.
        temperature: of sampling; 0 always takes the most likely token.
        top_p: share of probability that sampling keeps.
        max_gen_len: tokens of the continuation at most; by default as many as fit.
        max_seq_len: tokens of text and continuation together.
        seed: of sampling; by default the program's own, so that a call repeats itself.
        stop: text that ends the continuation, and is not part of it.
        tokenizer_path: by default tokenizer.model in ckpt_dir.
        device: cuda, mps or cpu; by default the best there is.
        dtype: bfloat16, float16 or float32; by default what suits the device.
        quantize: int8 or int4, or fp8 on CUDA; by default the weights as they are.
        compile: True, False or auto, which compiles on CUDA.
    """
    if prompt is None and sys.stdin.isatty():
        raise ArgumentError("no prompt: give one behind the folder, or on the standard input")
    with Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size=1,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
    ) as llama:
        if prompt is None:
            prompt = Terminal(llama.model.parallel).once(sys.stdin.read).removesuffix("\n")
        stops = [stop] if stop else []
        text = ""
        try:
            for event in llama.stream_text([prompt], temperature, top_p, max_gen_len, seed=seed, stop=stops):
                if event.error:
                    raise ArgumentError(event.error)
                text = event.text or text
                print(event.text, end="", flush=True)
            if not text.endswith("\n"):
                print(flush=True)
        except BrokenPipeError:  # whoever reads has enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# A text that looks like a number or a list stays a text.
fire.decorators.SetParseFn(str, "ckpt_dir", "system")(chat)
fire.decorators.SetParseFn(str, "ckpt_dir", "prompt", "stop")(complete)


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


class Chat:
    """One conversation with a model, in the terminal of rank 0.

    params: arguments of `Llama.stream_tokens`, by name.
    Raises ValueError where the model has no chat format.
    """

    def __init__(
        self, llama: Llama, conversation: Conversation, params: dict[str, Any], speed: bool = False
    ) -> None:
        check_params(params)
        conversation.prompt(llama, "")  # a base model refuses here
        self.llama = llama
        self.terminal = Terminal(llama.model.parallel)
        self.conversation = conversation
        self.params = params
        self.speed = speed
        self.commands: dict[str, Callable[[str], None]] = {
            "/system": self.set_system,
            "/reset": self.reset,
            "/retry": self.retry,
            "/save": self.save,
            "/load": self.load,
            "/params": self.set_params,
            "/speed": self.toggle_speed,
            "/help": self.help,
        }

    def run(self) -> None:
        """Read and answer until the end of the input."""
        if self.terminal.interactive:
            print("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D leaves.")
        with self.terminal.ctrl_c_as_key():
            while (line := self.terminal.read_line("> ")) is not None:
                try:
                    self.take(line.strip())
                except (ValueError, OSError) as error:
                    print(f"[{error}]")

    def take(self, line: str) -> None:
        """Do what one line says. Raises ValueError or OSError where that cannot be done."""
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.answer(line)
        elif name in self.commands:
            self.commands[name](rest.strip())
        else:
            raise ArgumentError(f"there is no {name}; /help lists the commands")

    def answer(self, message: str) -> None:
        """Answer a message, as the conversation's next turn, and print the answer as it comes."""
        prompt = self.fit(message)
        tokens: list[int] = []
        end = None
        with (
            self.terminal.watching(),
            contextlib.closing(self.llama.stream_tokens([prompt], **self.params)) as events,
        ):
            for event in events:
                print(event.text, end="", flush=True)
                if event.token is not None:
                    tokens.append(event.token)
                if event.finish_reason:
                    end = event
                elif self.terminal.interrupted():
                    break
        print()
        if end and end.error:
            raise ArgumentError(end.error)
        self.conversation.turns.append(Turn(message, tokens))
        if end is None:
            print("[stopped]")
        elif end.finish_reason == "length":
            limit = self.params.get("max_gen_len")
            reached = len(tokens) == limit
            print(
                f"[cut at max_gen_len={limit}]"
                if reached
                else f"[cut: the context of {self.context} tokens is full]"
            )
        if self.speed and end and end.stats:
            s = end.stats
            print(
                f"[{s.new_tokens} tokens at {s.tokens_per_second:.1f} a second, the first after "
                f"{s.first_token_seconds:.2f} s; of {s.prompt_tokens} prompt tokens {s.reused_tokens} were "
                f"in the cache; context {s.prompt_tokens + s.new_tokens} of {self.context}]"
            )

    @property
    def context(self) -> int:
        return self.llama.model.params.max_seq_len

    def fit(self, message: str) -> list[int]:
        """The prompt for a message, with room for an answer; drops the oldest turns for that, and says so.

        Raises ValueError for a message that does not fit without any turn before it.
        """
        turns = self.conversation.turns
        room = max(1, min(self.params.get("max_gen_len") or self.context, self.context // 4))
        for skip in range(len(turns) + 1):
            ids = self.conversation.prompt(self.llama, message, skip)
            if len(ids) + room <= self.context:
                break
        if len(ids) >= self.context:
            raise ArgumentError(
                f"the message takes {len(ids)} tokens with what surrounds it, and the context has "
                f"{self.context}: shorten it, or start with a larger --max_seq_len"
            )
        if skip:
            dropped = ", ".join(json.dumps(_short(turn.message), ensure_ascii=False) for turn in turns[:skip])
            which = "turn" if skip == 1 else f"{skip} turns"
            print(f"[The context of {self.context} tokens is full. Dropped the oldest {which}: {dropped}]")
            del turns[:skip]
        return ids

    def set_system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "-" else text
        print(f"[system: {self.conversation.system or 'none of its own'}]")

    def reset(self, _: str) -> None:
        self.conversation.turns.clear()
        print("[all turns forgotten]")

    def retry(self, _: str) -> None:
        if not self.conversation.turns:
            raise ArgumentError("there is no message to answer again")
        last = self.conversation.turns.pop()
        try:
            self.answer(last.message)
        except BaseException:
            self.conversation.turns.append(last)
            raise

    def save(self, name: str) -> None:
        text = self.conversation.dump(self.llama)
        path = _path(name)
        self.terminal.once(lambda: path.write_text(text, "utf-8"))
        print(f"[saved {len(self.conversation.turns)} turns to {path}]")

    def load(self, name: str) -> None:
        path = _path(name)
        self.conversation = Conversation.parse(
            self.terminal.once(lambda: path.read_text("utf-8")), self.llama
        )
        print(f"[loaded {len(self.conversation.turns)} turns from {path}]")

    def set_params(self, text: str) -> None:
        changed = {**self.params, **dict(_parse_param(item) for item in text.split())}
        check_params(changed)
        self.params = changed
        print(f"[{' '.join(f'{name}={value}' for name, value in changed.items())}]")

    def toggle_speed(self, _: str) -> None:
        self.speed = not self.speed
        print(f"[speed is {'shown' if self.speed else 'not shown'}]")

    def help(self, _: str) -> None:
        print(HELP)


def check_params(params: dict[str, Any]) -> None:
    """Raise ValueError for a parameter out of its range."""
    values = {name: value for name, value in params.items() if name != "max_gen_len"}
    if values.get("seed") is None:
        values.pop("seed", None)
    SamplingParams(max_tokens=params.get("max_gen_len"), **values)


def _parse_param(item: str) -> tuple[str, Any]:
    name, _, value = item.partition("=")
    if name not in PARAMS or not value:
        raise ArgumentError(f"{item!r} is not name=value with one of {', '.join(PARAMS)}")
    try:
        return name, ast.literal_eval(value.capitalize() if value.lower() == "none" else value)
    except (ValueError, SyntaxError):
        raise ArgumentError(f"{name} must be a number or None, not {value!r}") from None


def _path(name: str) -> Path:
    if not name:
        raise ArgumentError("which file? give its name behind the command")
    return Path(name).expanduser()


def _short(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
