"""The command that continues a text."""

from llama.cli.answer import Plain, print_answer
from llama.cli.options import BuildOptions, SamplingOptions, check_prompt, read_prompt
from llama.cli.terminal import Terminal


def complete(
    ckpt_dir: str,
    prompt: str | None = None,
    *,
    file: str | None = None,
    json: bool = False,
    sampling: SamplingOptions = SamplingOptions(),
    build: BuildOptions = BuildOptions(max_seq_len=2048),
) -> None:
    """Continue a text and print the continuation as it is generated.

    Args:
        ckpt_dir: folder of a checkpoint, a GGUF file, a URL, or a Hugging Face repository
        prompt: the text; by default that of --file, or standard input
        file: a UTF-8 text file to continue
        json: print one JSON object at the end: text, finish_reason, counts and speed
    """
    check_prompt(prompt, file)
    with build.build(ckpt_dir) as llama:
        text = read_prompt(prompt, file, Terminal(llama.model.parallel))
        print_answer(llama.stream_text([text], **sampling.arguments()), Plain(), json)
