"""Random tools and calls, the same on every machine."""

import random
import string
from typing import Any

WORDS = [
    "weather",
    "city",
    "list",
    "of",
    "the",
    "best",
    "hotel",
    "(or",
    "free),",
    "if",
    "any:",
    "über",
    "日本",
]


def words(rng: random.Random, n: int) -> str:
    return " ".join(WORDS[int(rng.random() * len(WORDS))] for _ in range(n))


def identifier(rng: random.Random) -> str:
    return "".join(string.ascii_lowercase[int(rng.random() * 26)] for _ in range(3 + int(rng.random() * 6)))


def tools(seed: int) -> list[dict[str, Any]]:
    """One to four OpenAI objects, of what Meta's tool definitions can say."""
    rng = random.Random(seed)
    listed = []
    for _ in range(1 + int(rng.random() * 4)):
        properties: dict[str, Any] = {}
        for _ in range(int(rng.random() * 5)):
            kind = ("string", "integer", "number", "boolean", "array")[int(rng.random() * 5)]
            schema: dict[str, Any] = {"type": kind, "description": words(rng, 4)}
            if rng.random() < 0.3:
                schema["default"] = (words(rng, 1), 5, 2.5, True, 0, False)[int(rng.random() * 6)]
            properties[identifier(rng)] = schema
        required = [name for name in properties if rng.random() < 0.5]
        parameters = {"type": "object", "properties": properties, "required": required}
        function = {"name": identifier(rng), "description": words(rng, 6), "parameters": parameters}
        listed.append({"type": "function", "function": function})
    return listed


TEXTS = [
    "it's",
    'say "hi"',
    "a, b; c",
    "{x}",
    "[y](z)",
    "</function>",
    "\\n \n",
    "Zürich 東京 🙂",
    "",
    "-3",
    "<",
    "'\"'",
]


def value(rng: random.Random, depth: int = 2) -> Any:
    kind = int(rng.random() * (8 if depth else 6))
    if kind < 2:
        return TEXTS[int(rng.random() * len(TEXTS))]
    if kind < 6:
        return (-7, 0, 2.5, True, False, None, -0.25, 10**12)[int(rng.random() * 8)]
    if kind == 6:
        return [value(rng, depth - 1) for _ in range(int(rng.random() * 3))]
    return {
        TEXTS[int(rng.random() * len(TEXTS))]: value(rng, depth - 1) for _ in range(int(rng.random() * 3))
    }


def calls(rng: random.Random, names: list[str], most: int) -> list[tuple[str, dict[str, Any]]]:
    return [
        (
            names[int(rng.random() * len(names))],
            {identifier(rng): value(rng) for _ in range(int(rng.random() * 4))},
        )
        for _ in range(1 + int(rng.random() * most))
    ]
