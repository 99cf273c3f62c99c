"""The command that serves a model over HTTP."""

import contextlib
from pathlib import Path

from llama.arguments import whole
from llama.cli.launch import default_ckpt_dir
from llama.cli.options import BuildOptions
from llama.cli.terminal import Terminal
from llama.errors import ArgumentError, MissingPackageError
from llama.guard import Guard

try:
    from llama.server import run
    from llama.server.service import Limits
except ModuleNotFoundError as error:  # the packages of an extra
    run, missing = None, error.name  # type: ignore[assignment]


def serve(
    ckpt_dir: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: tuple[str, ...] = (),
    api_key_file: str | None = None,
    cors: tuple[str, ...] = (),
    queue: int = 256,
    timeout: float = 600.0,
    max_body: int = 8 << 20,
    tool_format: str | None = None,
    guard: str | None = None,
    log_prompts: bool = False,
    metrics_prefix: str = "llama",
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    build: BuildOptions = BuildOptions(max_batch_size=8),
) -> None:
    """Serve a model over HTTP, with OpenAI's and Anthropic's APIs and a page to try it.

    Args:
        ckpt_dir: folder of a checkpoint, a GGUF file, a URL, or a Hugging Face repository; by default
            the demo model, if it is in this folder
        host: address to listen on; 0.0.0.0 for all networks
        port: port to listen on
        name: model name for clients; by default the folder's name
        api_key: key that requests must send; a JSON list for several
        api_key_file: file with API keys, one per line; unlike --api_key, invisible in process lists
        cors: origins of web pages allowed to call, such as https://example.org; a JSON list for several
        queue: answers that may wait for a slot; further requests get status 429
        timeout: maximum seconds per request, including its wait
        max_body: maximum bytes of a request
        tool_format: how prompts describe tools; by default as in the checkpoint's training, if any
        guard: folder of a Llama Guard that checks what users ask and what the model answers
        log_prompts: also log prompts and answers, which are private otherwise
        metrics_prefix: prefix of metric names; with vllm, dashboards for vLLM work
        ssl_certfile: TLS certificate
        ssl_keyfile: key of the TLS certificate
    """
    if run is None:
        raise MissingPackageError(f"serve needs the package {missing}: pip install -e '.[serve]'")
    for option, value in {"queue": queue, "max_body": max_body, "port": port}.items():
        whole(option, value, 0)
    if timeout <= 0:
        raise ArgumentError(f"timeout must be more than 0 seconds, not {timeout:g}")
    if bool(ssl_certfile) != bool(ssl_keyfile):
        raise ArgumentError("TLS needs both --ssl_certfile and --ssl_keyfile")
    keys = [*api_key, *(Path(api_key_file).read_text("utf-8").split() if api_key_file else ())]
    if api_key_file and not keys:
        raise ArgumentError(f"{api_key_file} contains no API key")
    ckpt_dir = ckpt_dir or str(default_ckpt_dir())
    address = run.Address(host, port, keys, cors, ssl_certfile, ssl_keyfile)
    with contextlib.ExitStack() as stack:
        llama = stack.enter_context(build.build(ckpt_dir))
        moderator = stack.enter_context(Guard.build(guard, device=build.device)) if guard else None
        llama.tool_format = tool_format or llama.tool_format
        once = Terminal(llama.model.parallel).once
        name = name or Path(ckpt_dir).resolve().stem
        limits = Limits(queue, timeout, max_body)
        run.serve(llama, once, name, address, limits, metrics_prefix, moderator, log_prompts)
