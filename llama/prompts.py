"""Prompts with images: from what a caller passes to token ids and to images as the model reads them."""

from collections.abc import Iterable
from typing import Any

from llama.arguments import entries
from llama.model import Transformer
from llama.tokenizer import Dialog, DialogFormat, TextTokenizer
from llama.tokenizer.chat_format import encode_parts
from llama.tokenizer.content import IMAGE, join_dialog, split_content, split_dialog
from llama.tools.use import ToolUse
from llama.vision import ImageSource, TiledImage, sighted, tile_image

Encoded = tuple[list[list[int]], list[list[ImageSource]]]  # ids of prompts, and their images


def encode_texts(prompts: Iterable[Any], model: Transformer, tokenizer: TextTokenizer) -> Encoded:
    """Ids and images of prompts, each of them text or a list of parts. Raises ArgumentError otherwise."""
    ids, images = [], []
    for prompt in entries(prompts, "prompts"):
        content, found = split_content(prompt)
        if found:
            begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            ids.append([*begin, *with_image_token(encode_parts(tokenizer, content), model, tokenizer)])
        else:
            ids.append(tokenizer.encode(content, bos=True, eos=False))
        images.append(found)
    return ids, images


def encode_dialogs(
    use: ToolUse,
    dialogs: Iterable[Dialog],
    model: Transformer,
    tokenizer: TextTokenizer,
    formatter: DialogFormat,
) -> tuple[list[Dialog], list[list[int]], list[list[ImageSource]]]:
    """Dialogs with parts of one form, the ids that prompt for the next messages, and the images.

    Raises ArgumentError for a dialog that the chat format cannot represent, PromptError for images if
    the model reads text only.
    """
    whole, ids, images = [], [], []
    for given in entries(dialogs, "dialogs"):
        dialog, found = split_dialog(given)
        if found:
            sighted(model)
        prompt = use.encode(dialog, formatter, tokenizer)
        whole.append(join_dialog(dialog, found))
        ids.append(with_image_token(prompt, model, tokenizer) if found else prompt)
        images.append(found)
    return whole, ids, images


def with_image_token(ids: list[int], model: Transformer, tokenizer: TextTokenizer) -> list[int]:
    """Ids with the tokenizer's image token replaced by the model's."""
    image = tokenizer.special_tokens[IMAGE]
    return [model.params.vocab_size if token == image else token for token in ids]


def tiled(image: ImageSource | TiledImage, model: Transformer) -> TiledImage:
    """An image as a model reads it. Raises PromptError if it is invalid or the model reads text only."""
    args = sighted(model).params
    if isinstance(image, TiledImage):
        return image
    return tile_image(image, args.vision_chunk_size, args.vision_max_num_chunks)
