"""HTTP around one model: the interfaces of OpenAI and Anthropic over the one engine."""
