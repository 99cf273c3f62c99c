"""The command that answers one question."""

from typing import Literal

from llama.cli.answer import print_answer, writer
from llama.cli.options import BuildOptions, SamplingOptions, check_prompt, read_prompt
from llama.cli.terminal import Terminal
from llama.tokenizer import Message


def ask(
    ckpt_dir: str,
    question: str | None = None,
    *,
    system: str = "",
    file: str | None = None,
    json: bool = False,
    markdown: bool | Literal["auto"] = "auto",
    sampling: SamplingOptions = SamplingOptions(),
    build: BuildOptions = BuildOptions(),
) -> None:
    """Answer one question with a chat model and print the answer as it is generated.

    Args:
        ckpt_dir: folder of a checkpoint, a GGUF file, a URL, or a Hugging Face repository
        question: what to answer; by default the text of --file, or standard input
        system: the system prompt
        file: a UTF-8 text file that contains the question
        json: print one JSON object at the end: text, finish_reason, counts and speed
        markdown: render the answer; auto means on a terminal, if the rich package is installed
    """
    check_prompt(question, file)
    write = writer(markdown)
    with build.build(ckpt_dir) as llama:
        text = read_prompt(question, file, Terminal(llama.model.parallel))
        dialog: list[Message] = [{"role": "user", "content": text}]
        if system:
            dialog.insert(0, {"role": "system", "content": system})
        print_answer(llama.stream_chat([dialog], **sampling.arguments()), write(), json)
