"""What tests share: tiny checkpoints of every format, oracles, ranks, servers."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = "SmolLM2-135M-Instruct"
