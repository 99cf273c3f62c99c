"""Requests in, tokens out; token ids only."""

from llama.engine.engine import Engine
from llama.engine.request import Event, FinishReason, Request, TopLogprobs
from llama.errors import PromptError

__all__ = ["Engine", "Event", "FinishReason", "PromptError", "Request", "TopLogprobs"]
