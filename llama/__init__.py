"""A native runtime for Meta's Llama models."""

from llama.generation import Llama
from llama.model import ModelArgs, Transformer
from llama.streaming import StreamEvent
from llama.tokenizer import Dialog, Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "StreamEvent", "Tokenizer", "Transformer"]
