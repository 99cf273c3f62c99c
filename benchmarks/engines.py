"""The engines that are compared. Each opens one model and returns a function to be timed.

That function takes prompts of token ids, of any length, and a number of tokens; it generates that many
greedily after every prompt, all prompts in one batch, and calls `tick` whenever each has one more token.
All run on the CPU, with as many threads as PyTorch uses.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama import Llama
from llama.sampling import SamplingParams

Prompts = list[list[int]]
Generate = Callable[[Prompts, int, Callable[[], None]], Prompts]


def ours(folder: Path, context: int, batch: int, quantize: str = "native", **options: Any) -> Generate:
    """quantize: the folder of weights that were quantized beforehand, like the peers'."""
    # The others compute in bf16 on the CPU, whatever else this machine has.
    options = {"device": "cpu", "dtype": "bfloat16", **options}
    return generator(Llama.build(folder / quantize, max_seq_len=context, max_batch_size=batch, **options))


def generator(llama: Llama) -> Generate:
    def generate(prompts: Prompts, new: int, tick: Callable[[], None]) -> Prompts:
        params = SamplingParams(temperature=0, max_tokens=new)
        requests = [llama.engine.add(prompt, params) for prompt in prompts]
        while llama.engine.has_work():
            llama.engine.step()
            if all(request.tokens for request in requests):
                tick()
        return [request.tokens for request in requests]

    return generate


def meta(folder: Path, context: int, batch: int) -> Generate:
    """Meta's model, with its own generation loop: the shortest prompt in one pass, then token by token."""
    import torch.distributed as dist
    from fairscale.nn.model_parallel import initialize as topology
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    from llama.checkpoint.params import read_params
    from llama.checkpoint.source import read_shard

    dist.init_process_group(
        "gloo",
        store=dist.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    topology.initialize_model_parallel(1)
    torch.set_default_dtype(torch.bfloat16)
    native = folder / "native"
    model = Transformer(ModelArgs(**read_params(native), max_seq_len=context, max_batch_size=batch))
    weights = read_shard(native / "consolidated.00.pth")
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    model.load_state_dict(weights)

    @torch.inference_mode()
    def generate(prompts: Prompts, new: int, tick: Callable[[], None]) -> Prompts:
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest + new, dtype=torch.int64)
        given = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = torch.tensor(prompt)
            given[i, : len(prompt)] = True
        before = 0
        for at in range(shortest, longest + new):
            chosen = model(tokens[:, before:at], before)[:, -1].argmax(-1)
            tokens[:, at] = torch.where(given[:, at], tokens[:, at], chosen)
            before = at
            if at >= longest:
                tick()
        return [row[len(p) : len(p) + new].tolist() for row, p in zip(tokens, prompts, strict=True)]

    return generate


def transformers(folder: Path, context: int, batch: int, compiled: bool = False) -> Generate:
    """Scaled dot product attention; prompts padded on the left, prefill without compilation.

    compiled: use one cache size for all calls, and decode steps compiled by torch.compile.
    """
    from transformers import AutoModelForCausalLM, CompileConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    options: dict[str, Any] = {}
    if compiled:
        config: Any = CompileConfig()
        config._compile_all_devices = True  # by default, generate() compiles only on GPUs
        options = {"cache_implementation": "static", "max_cache_len": context, "compile_config": config}

    @torch.inference_mode()
    def generate(prompts: Prompts, new: int, tick: Callable[[], None]) -> Prompts:
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

        def tick_and_go_on(ids: torch.Tensor, scores: object) -> torch.Tensor:
            tick()
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = model.generate(
            padded,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            stopping_criteria=[tick_and_go_on],
            **options,
        )
        return ids[:, longest:].tolist()

    return generate


def llama_cpp(folder: Path, context: int, batch: int, file: str = "bf16") -> Generate:
    """llama.cpp through its C API: prompts in batches of 512 tokens, then one token for each."""
    import llama_cpp as cpp
    import numpy as np

    silence(cpp)
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(bytes(folder / f"{file}.gguf"), cpp.llama_model_default_params())
    params = cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max = context * batch, 512, batch
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    cache = cpp.llama_init_from_model(model, params)
    vocab_size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    tokens = cpp.llama_batch_init(512, 0, 1)

    def decode(part: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run tokens (id, position, sequence, whether logits are needed); returns the tokens after those."""
        tokens.n_tokens = len(part)
        for i, (token, position, sequence, wanted) in enumerate(part):
            tokens.token[i], tokens.pos[i], tokens.logits[i] = token, position, wanted
            tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, sequence
        if cpp.llama_decode(cache, tokens):
            raise RuntimeError("llama.cpp could not decode")
        rows = [cpp.llama_get_logits_ith(cache, i) for i, item in enumerate(part) if item[3]]
        return [int(np.ctypeslib.as_array(row, (vocab_size,)).argmax()) for row in rows]

    def generate(prompts: Prompts, new: int, tick: Callable[[], None]) -> Prompts:
        cpp.llama_memory_clear(cpp.llama_get_memory(cache), True)
        queue = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        last = [t for first in range(0, len(queue), 512) for t in decode(queue[first : first + 512])]
        tick()
        chosen = [last]
        for n in range(new - 1):
            last = decode([(t, len(prompts[i]) + n, i, True) for i, t in enumerate(last)])
            chosen.append(last)
            tick()
        return [list(tokens) for tokens in zip(*chosen, strict=True)]

    return generate


def openvino(folder: Path, context: int, batch: int, file: str = "") -> Generate:
    """OpenVINO GenAI's continuous batching, without its prefix cache.

    file: a folder that `optimum-cli export openvino --model FOLDER/hf` wrote.
    """
    import numpy as np
    from openvino import Tensor
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

    scheduler = SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.max_num_seqs = False, batch
    scheduler.max_num_batched_tokens, scheduler.cache_size = 512, 1
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    pipeline = ContinuousBatchingPipeline(str(folder / file), scheduler, "CPU", threads)
    numbers = itertools.count()

    def generate(prompts: Prompts, new: int, tick: Callable[[], None]) -> Prompts:
        config = GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        inputs = [Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        handles = [pipeline.add_request(next(numbers), tokens, config) for tokens in inputs]
        chosen: Prompts = [[] for _ in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for tokens, handle in zip(chosen, handles, strict=True):
                while handle.can_read():
                    tokens += next(iter(handle.read().values())).generated_ids
            if all(chosen):
                tick()
        return chosen

    return generate


def onnx_runtime(folder: Path, context: int, batch: int, file: str = "") -> Generate:
    """ONNX Runtime GenAI; prompts must have the same length.

    file: a folder that was written by python -m onnxruntime_genai.models.builder -m FOLDER/hf -o PATH -p int4
        -e cpu -c CACHE --extra_options int4_accuracy_level=4
    """
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(str(folder / file))
    session = {"intra_op_num_threads": torch.get_num_threads()}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = genai.Model(config)

    def generate(prompts: Prompts, new: int, tick: Callable[[], None]) -> Prompts:
        params, length = genai.GeneratorParams(model), len(prompts[0]) + new
        params.set_search_options(
            do_sample=False, batch_size=len(prompts), max_length=length, min_length=length
        )
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        chosen = []
        for _ in range(new):
            generator.generate_next_token()
            chosen.append(generator.get_next_tokens().tolist())
            tick()
        return [list(tokens) for tokens in zip(*chosen, strict=True)]

    return generate


def silence(cpp: Any) -> None:
    """Silence llama.cpp, which prints a page about every file it opens."""
    cpp.silent = cpp.llama_log_callback(lambda *_: None)  # keep a reference, because C does not
    cpp.llama_log_set(cpp.silent, None)


# By name in the table: what opens it, the module it needs besides this package, and arguments.
ENGINES: dict[str, tuple[Callable[..., Generate], str | None, dict[str, Any]]] = {
    "this runtime, bf16": (ours, None, {}),
    "this runtime, bf16, compiled": (ours, None, {"compile": True}),
    "this runtime, int8": (ours, None, {"quantize": "int8"}),
    "this runtime, int4": (ours, None, {"quantize": "int4"}),
    "Meta's llama-models, bf16": (meta, "llama_models.llama3.model", {}),
    "transformers, bf16": (transformers, "transformers.models.llama.modeling_llama", {}),
    "transformers, bf16, static cache, compiled": (
        transformers,
        "transformers.models.llama.modeling_llama",
        {"compiled": True},
    ),
    "llama.cpp, bf16": (llama_cpp, "llama_cpp", {"file": "bf16"}),
    "llama.cpp, Q8_0": (llama_cpp, "llama_cpp", {"file": "Q8_0"}),
    "llama.cpp, Q4_0": (llama_cpp, "llama_cpp", {"file": "Q4_0"}),
    "llama.cpp, Q4_1": (llama_cpp, "llama_cpp", {"file": "Q4_1"}),
    "OpenVINO GenAI, bf16": (openvino, "openvino_genai", {"file": "openvino-fp16"}),
    "OpenVINO GenAI, int8": (openvino, "openvino_genai", {"file": "openvino-int8"}),
    "OpenVINO GenAI, int4": (openvino, "openvino_genai", {"file": "openvino-int4"}),
    "ONNX Runtime GenAI, int4": (onnx_runtime, "onnxruntime_genai", {"file": "onnx-int4"}),
}
