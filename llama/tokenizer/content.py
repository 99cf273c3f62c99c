"""The content of a message or prompt: text, or parts that are text or images.

Parts may have the form of this package, of OpenAI's API or of `transformers`:
{"type": "text", "text": …}, {"type": "image", "image": path, bytes, Pillow image or data URL},
{"type": "image_url", "image_url": {"url": data URL}}, {"type": "image", "path" or "url" or "base64": …}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama.errors import ArgumentError, PromptError

IMAGE = "<|image|>"  # the name of the token that stands for an image
FORMS = (
    'each part of a content must be a string, {"type": "text", "text": …}, {"type": "image", "image": …} or '
    '{"type": "image_url", "image_url": {"url": …}}'
)


def split_content(content: Any) -> tuple[Any, list[Any]]:
    """Content without its images, and the images as they were passed.

    Returns text if there are no images, else parts {"type": "text", "text": …} and {"type": "image"}.
    Raises ArgumentError for anything other than text or parts.
    """
    if not isinstance(content, list | tuple):
        return content, []
    parts: list[dict[str, str]] = []
    images: list[Any] = []
    for part in content:
        found = _parse(part)
        if not isinstance(found, str):
            images.append(found[0])
            parts.append({"type": "image"})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += found
        else:
            parts.append({"type": "text", "text": found})
    if not images:
        return "".join(part["text"] for part in parts), []
    return parts, images


def split_dialog(dialog: Any) -> tuple[Any, list[Any]]:
    """A dialog with `split_content` applied to every message, and all its images."""
    if not isinstance(dialog, Sequence) or isinstance(dialog, str):
        return dialog, []  # the chat format raises for it
    messages, images = [], []
    for message in dialog:
        if isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple):
            content, found = split_content(message["content"])
            message = {**message, "content": content}
            images += found
        messages.append(message)
    return messages, images


def join_dialog(dialog: Any, images: Sequence[Any]) -> Any:
    """The inverse of `split_dialog`."""
    left = iter(images)

    def whole(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**part, "image": next(left)} if part["type"] == "image" else part

    return [
        {**message, "content": [whole(part) for part in content]}
        if isinstance(content := message.get("content"), list)
        else message
        for message in dialog
    ]


def _parse(part: Any) -> str | tuple[Any]:
    """The text of a part, or its image in a tuple."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ArgumentError(f"{FORMS}; not a {type(part).__name__}")
    kind = part.get("type")
    if kind == "text" and isinstance(text := part.get("text"), str):
        return text
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        # Never a path: these parts may come from someone else's program.
        if not isinstance(url, str) or not url.startswith("data:"):
            raise PromptError("an image_url must be a data URL (data:image/png;base64,…)")
        return (url,)
    if kind == "image":
        for key in ("image", "path", "url"):
            if part.get(key) is not None:
                return (part[key],)
        if isinstance(data := part.get("base64"), str):
            return (f"data:image/png;base64,{data}",)
    raise ArgumentError(f"{FORMS}; got one with type {kind!r} and {', '.join(map(str, part)) or 'no keys'}")


def is_parts(content: Any) -> bool:
    """Whether content has the form that `split_content` returns if there are images."""
    return isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") in ("text", "image") for part in content
    )


def text_of(content: Any) -> str:
    """The text of a message's content, without images."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
