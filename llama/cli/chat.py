"""The command that chats in the terminal."""

import contextlib
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from llama.cli.answer import Markdown, Plain, Writer, writer
from llama.cli.arguments import shared_options
from llama.cli.conversation import Conversation, Turn
from llama.cli.launch import default_ckpt_dir
from llama.cli.options import BuildOptions, SamplingOptions
from llama.cli.terminal import Terminal
from llama.errors import ArgumentError
from llama.generation import Llama
from llama.prompts import tiled
from llama.vision import image_bytes, sighted

HELP = """\
/system TEXT   set the system prompt;  /system  show it;  /system -  remove it
/image FILE    send an image with the next message
/reset         clear the history
/retry         answer the last message again
/save FILE     save the conversation;  /load FILE  continue a saved one
/params        show the sampling parameters;  /params temperature=0.2 top_k=40  set some
/markdown      render answers as Markdown: on or off
/speed         show counts and speed after each answer: on or off
/help          show this;  /quit, /exit or Ctrl-D  quit
//...          send a message that begins with a slash
Ctrl-C stops an answer. Tab completes commands. A backslash at the end of a line continues it."""


def chat(
    ckpt_dir: str | None = None,
    *,
    system: str = "",
    speed: bool = False,
    markdown: bool | Literal["auto"] = "auto",
    history: bool = True,
    sampling: SamplingOptions = SamplingOptions(),
    build: BuildOptions = BuildOptions(),
) -> None:
    """Chat with a model in the terminal.

    Args:
        ckpt_dir: folder of a checkpoint, a GGUF file, a URL, or a Hugging Face repository; by default
            the demo model, if it is in this folder
        system: the system prompt
        speed: show counts and speed after each answer
        markdown: render answers; auto means on a terminal, if the rich package is installed
        history: keep typed lines for the arrow keys in later sessions
    """
    write = writer(markdown)
    with build.build(ckpt_dir or default_ckpt_dir()) as llama:
        Chat(llama, Conversation(system), sampling, speed=speed, write=write, history=history).run()


class Chat:
    """One conversation with a model, in the terminal of rank 0.

    write: creates a writer for each answer.
    history: whether to keep typed lines for later sessions.
    Raises ArgumentError if the model has no chat format.
    """

    def __init__(
        self,
        llama: Llama,
        conversation: Conversation,
        sampling: SamplingOptions,
        *,
        speed: bool = False,
        write: Callable[[], Writer] = Plain,
        history: bool = False,
    ) -> None:
        conversation.prompt(llama, "")  # a base model refuses here
        self.llama = llama
        self.conversation = conversation
        self.sampling = sampling
        self.speed = speed
        self.write = write
        self.left = False
        self.images: list[bytes] = []  # for the next message
        self.commands: dict[str, Callable[[str], None]] = {
            "/system": self.set_system,
            "/image": self.add_image,
            "/reset": self.reset,
            "/retry": self.retry,
            "/save": self.save,
            "/load": self.load,
            "/params": self.set_params,
            "/markdown": self.toggle_markdown,
            "/speed": self.toggle_speed,
            "/help": self.help,
            "/quit": self.leave,
            "/exit": self.leave,
        }
        self.terminal = Terminal(llama.model.parallel, self.commands, history)

    def run(self) -> None:
        """Read and answer until the end of the input, or /quit."""
        if self.terminal.interactive:
            print("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D quits.")
        with self.terminal.ctrl_c_as_key():
            while not self.left and (line := self.terminal.read_line("> ")) is not None:
                try:
                    self.take(line.strip())
                except (ValueError, OSError) as error:
                    print(f"[{error}]")

    def take(self, line: str) -> None:
        """Answer one message or run one command. Raises ValueError or OSError if that fails."""
        name, _, rest = line.partition(" ")
        if line.startswith("//") or not line.startswith("/"):
            if line:
                self.answer(line.removeprefix("/"))
        elif name in self.commands:
            self.commands[name](rest.strip())
        else:
            raise ArgumentError(f"unknown command {name}; /help lists the commands")

    def answer(self, message: str) -> None:
        """Answer a message as the conversation's next turn and print the answer as it is generated."""
        prompt = self.fit(message)
        images = [*self.conversation.images(), *self.images]
        tokens: list[int] = []
        end, screen = None, self.write()
        with (
            self.terminal.watching(),
            contextlib.closing(
                self.llama.stream_tokens([prompt], images=[images], **self.sampling.arguments())
            ) as events,
        ):
            for event in events:
                screen.write(event.text)
                if event.token is not None:
                    tokens.append(event.token)
                if event.finish_reason:
                    end = event
                elif self.terminal.interrupted():
                    break
        screen.close()
        if end and end.error:
            raise ArgumentError(end.error)
        self.conversation.turns.append(Turn(message, tokens, tuple(self.images)))
        self.images = []
        if end is None:
            print("[stopped]")
        elif end.finish_reason == "length":
            limit = self.sampling.max_gen_len
            reached = len(tokens) == limit
            print(
                f"[cut off at max_gen_len={limit}]"
                if reached
                else f"[cut off: the context of {self.context} tokens is full]"
            )
        if self.speed and end and end.stats:
            s = end.stats
            print(
                f"[{s.new_tokens} tokens at {s.tokens_per_second:.1f} per second, the first after "
                f"{s.first_token_seconds:.2f} s; {s.reused_tokens} of {s.prompt_tokens} prompt tokens were "
                f"in the cache; context {s.prompt_tokens + s.new_tokens} of {self.context}]"
            )

    @property
    def context(self) -> int:
        return self.llama.model.params.max_seq_len

    def fit(self, message: str) -> list[int]:
        """The prompt for a message, with room for an answer; if needed, drops the oldest turns and says so.

        Raises ValueError if the message does not fit even without earlier turns.
        """
        turns = self.conversation.turns
        room = max(1, min(self.sampling.max_gen_len or self.context, self.context // 4))
        for skip in range(len(turns) + 1):
            ids = self.conversation.prompt(self.llama, message, skip, self.images)
            images = len(self.images) + len(self.conversation.images(skip))
            if len(ids) + room <= self.context and images <= self.max_images:
                break
        if len(ids) >= self.context:
            raise ArgumentError(
                f"the message and system prompt need {len(ids)} tokens, but the context holds "
                f"{self.context}: shorten them, or start with a larger --max_seq_len"
            )
        if skip:
            dropped = ", ".join(json.dumps(_short(turn.message), ensure_ascii=False) for turn in turns[:skip])
            which = "turn" if skip == 1 else f"{skip} turns"
            full = f"context of {self.context} tokens"
            if len(self.images) + len(self.conversation.images()) > self.max_images:
                full = f"room for {self.max_images} image(s)"
            print(f"[The {full} is full. Dropped the oldest {which}: {dropped}]")
            del turns[:skip]
        return ids

    def set_system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "-" else text
        print(f"[system: {self.conversation.system or 'none'}]")

    def add_image(self, name: str) -> None:
        sighted(self.llama.model)
        if len(self.images) >= self.max_images:
            raise ArgumentError(
                f"this chat has room for {self.max_images} image(s): start with a larger --max_images"
            )
        path = _path(name)
        data = self.terminal.once(lambda: image_bytes(path))
        tiled(data, self.llama.model)  # raises for a bad file
        self.images.append(data)
        print(f"[{path.name} will be sent with your next message]")

    @property
    def max_images(self) -> int:
        return getattr(self.llama.model.params, "max_images", 0)

    def reset(self, _: str) -> None:
        self.images = []
        self.conversation.turns.clear()
        print("[history cleared]")

    def retry(self, _: str) -> None:
        if not self.conversation.turns:
            raise ArgumentError("there is no message to retry")
        last = self.conversation.turns.pop()
        self.images = list(last.images)
        try:
            self.answer(last.message)
        except BaseException:
            self.conversation.turns.append(last)
            self.images = []
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
        known = {option.name: option for option in shared_options(self.sampling)}
        changes = {}
        for item in shlex.split(text):
            name, _, value = item.partition("=")
            if name not in known or not value:
                raise ArgumentError(f"expected name=value, not {item!r}; the names are {', '.join(known)}")
            changes[name] = known[name].parse(value)
        self.sampling = replace(self.sampling, **changes)
        print(f"[{' '.join(f'{name}={value}' for name, value in asdict(self.sampling).items())}]")

    def toggle_markdown(self, _: str) -> None:
        self.write = Plain if self.write is Markdown else writer(True)
        print(f"[answers are {'rendered as Markdown' if self.write is Markdown else 'shown as plain text'}]")

    def toggle_speed(self, _: str) -> None:
        self.speed = not self.speed
        print(f"[speed is {'shown' if self.speed else 'not shown'}]")

    def help(self, _: str) -> None:
        print(HELP)

    def leave(self, _: str) -> None:
        self.left = True


def _path(name: str) -> Path:
    if not name:
        raise ArgumentError("no file given: put its name after the command")
    return Path(name).expanduser()


def _short(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
