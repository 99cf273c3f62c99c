"""A Hugging Face folder's files besides weights, from a native checkpoint's tokenizer and parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.mllama import mllama_config
from llama.checkpoint.source import Checkpoint
from llama.errors import ArgumentError
from llama.files import write_json
from llama.model import ModelArgs
from llama.tokenizer import DialogFormat, SentencePieceTokenizer, Tokenizer
from llama.tokenizer.bpe import byte_alphabet
from llama.tokenizer.chat_format import ChatFormat, ChatML, Llama2Chat
from llama.tokenizer.template import ChatTemplate
from llama.vision import VisionArgs, make_args
from llama.vision.images import MEAN, STD

LLAMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{% set content %}{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<|image|>' }}"
    "{% endfor %}{% endif %}{% endset %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + content + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set head = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in messages %}{% for tag in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'] %}"
    "{% if tag in message['content'] %}{{ raise_exception('a message contains ' + tag) }}{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% for message in turns %}"
    "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('roles must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{% set content = (head if loop.first else '') + message['content'] %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' and DEFAULT %}"
    "{{ '<|im_start|>system\n' + DEFAULT + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_hf_config(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    """config.json and generation_config.json."""
    args, tokenizer = make_args(checkpoint.params), checkpoint.tokenizer
    stops = tokenizer.stop_tokens[0] if len(tokenizer.stop_tokens) == 1 else tokenizer.stop_tokens
    scaling = {
        "rope_type": "llama3",
        "factor": args.rope_scaling_factor,
        "low_freq_factor": float(args.low_freq_factor),
        "high_freq_factor": float(args.high_freq_factor),
        "original_max_position_embeddings": args.original_max_position_embeddings,
    }
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops}
    if tokenizer.pad_id >= 0 and tokenizer.pad_id not in tokenizer.stop_tokens:
        tokens["pad_token_id"] = tokenizer.pad_id
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": checkpoint.context or 8192,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": float(args.rope_theta),
        "rope_scaling": scaling if args.use_scaled_rope else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": is_tied(checkpoint),
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **tokens,
    }
    if isinstance(args, VisionArgs):
        write_json(folder / "preprocessor_config.json", preprocessor_config(args))
        config = mllama_config(args, config)
    write_json(folder / "config.json", config)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    write_json(folder / "generation_config.json", {**tokens, **sampling})


def preprocessor_config(args: VisionArgs) -> dict[str, Any]:
    """How `transformers` preprocesses images for a vision model."""
    return {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "max_image_tiles": args.vision_max_num_chunks,
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "size": {"height": args.vision_chunk_size, "width": args.vision_chunk_size},
    }


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the embeddings serve as output layer, which is either omitted or stored as a copy."""
    source = checkpoint.weights
    if "output.weight" not in source.shapes:
        return True
    n = source.shapes["output.weight"][0]
    for start in range(0, n, 4096):
        span = (start, min(start + 4096, n))
        same = torch.equal(
            source.read("output.weight", 0, span), source.read("tok_embeddings.weight", 0, span)
        )
        source.release()
        if not same:
            return False
    return True


def write_hf_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json with the chat template."""
    tokenizer = checkpoint.tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):
        content = sentencepiece_json(tokenizer)
        (folder / "tokenizer.model").write_bytes(tokenizer.proto)
        text = {i: piece for piece, i in tokenizer.special_tokens.items()}
    elif isinstance(tokenizer, Tokenizer):
        special = hf_special_tokens(tokenizer.special_tokens, make_args(checkpoint.params))
        content = tiktoken_json(tokenizer, special)
        text = {i: name for name, i in special.items()}
    else:
        raise ArgumentError(f"a {type(tokenizer).__name__} cannot be written as a tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": text.get(-1 if tokenizer.bos_id is None else tokenizer.bos_id),
        "eos_token": text[tokenizer.eos_id],
        "pad_token": text.get(tokenizer.pad_id),
        "model_max_length": checkpoint.context or 8192,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if template := template_of(checkpoint.formatter):
        config["chat_template"] = template
    if isinstance(checkpoint.formatter, ChatFormat):
        config["eos_token"] = "<|eot_id|>"  # in a chat, an answer ends with its turn
    write_json(folder / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})


def template_of(formatter: DialogFormat) -> str | None:
    """A chat format as a jinja2 template; None for models without one."""
    if isinstance(formatter, ChatFormat):
        return LLAMA3_TEMPLATE
    if isinstance(formatter, Llama2Chat):
        return LLAMA2_TEMPLATE
    if isinstance(formatter, ChatML):
        return CHATML_TEMPLATE.replace("DEFAULT", json.dumps(formatter.default_system, ensure_ascii=False))
    return formatter.source if isinstance(formatter, ChatTemplate) else None


def hf_special_tokens(special: Mapping[str, int], args: ModelArgs) -> dict[str, int]:
    """Special tokens with Hugging Face's ids: the image token has its id in the model."""
    if not isinstance(args, VisionArgs):
        return dict(special)
    spare = f"<|reserved_special_token_{len(special)}|>"
    return {spare if text == "<|image|>" else text: i for text, i in special.items()} | {
        "<|image|>": args.vocab_size
    }


def tiktoken_json(tokenizer: Tokenizer, special: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Byte-pair ranks as a `tokenizer.json` with the same ids.

    special: special tokens, by default the tokenizer's own
    """
    special = dict(tokenizer.special_tokens if special is None else special)
    to_character = {byte: character for character, byte in byte_alphabet().items()}
    vocab = {"".join(to_character[byte] for byte in token): i for token, i in tokenizer.ranks.items()}
    return _tokenizer_json(
        special,
        bos=tokenizer.layout.bos,
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": tokenizer.layout.pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        # tiktoken keeps a piece whole if it is a token, however it could be merged.
        model=_bpe(vocab | special, vocab, ignore_merges=True),
    )


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """A sentencepiece model of LLaMA 1 or 2 as a `tokenizer.json` with the same ids."""
    model = tokenizer.model
    vocab = {model.id_to_piece(i): i for i in range(tokenizer.n_words)}
    ordinary = [
        piece
        for piece, i in vocab.items()
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i))
    ]
    # Among possible merges, the piece with the best score comes first.
    ordinary.sort(key=lambda piece: -model.get_score(vocab[piece]))
    unknown = model.id_to_piece(model.unk_id())
    return _tokenizer_json(
        {unknown: model.unk_id(), **tokenizer.special_tokens},
        bos=None if tokenizer.bos_id is None else model.id_to_piece(tokenizer.bos_id),
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        model=_bpe(vocab, ordinary, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    )


def _bpe(vocab: Mapping[str, int], ordinary: Iterable[str], **options: Any) -> dict[str, Any]:
    """A BPE model that merges any two tokens whose joined text is one, in the order of `ordinary`."""
    merges = [
        pair
        for token in ordinary
        for pair in sorted(
            (
                (token[:i], token[i:])
                for i in range(1, len(token))
                if token[:i] in vocab and token[i:] in vocab
            ),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
    ]
    defaults = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {"type": "BPE", **defaults, **options, "vocab": vocab, "merges": merges}


def _tokenizer_json(
    special: Mapping[str, int],
    *,
    bos: str | None,
    normalizer: Any,
    pre_tokenizer: Any,
    decoder: Any,
    model: Any,
) -> dict[str, Any]:
    begin = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
    first, second = ({"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text, i in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*begin, first],
            "pair": [*begin, first, *begin, second],
            "special_tokens": {}
            if bos is None
            else {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}},
        },
        "decoder": decoder,
        "model": model,
    }
