"""Tools that models call: definitions, prompts, and the calls in an answer."""

from llama.tools.definitions import BUILTIN_TOOLS, Tool, call_function, parse_tools
from llama.tools.formats import FORMATS, tool_response
from llama.tools.parser import Delta, ParsedAnswer, ToolCall, ToolParser, parse_answer

__all__ = [
    "BUILTIN_TOOLS",
    "FORMATS",
    "Delta",
    "ParsedAnswer",
    "Tool",
    "ToolCall",
    "ToolParser",
    "call_function",
    "parse_answer",
    "parse_tools",
    "tool_response",
]
