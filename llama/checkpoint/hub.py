"""Repositories on the Hugging Face hub, downloaded by its own package into its own cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llama.errors import MissingPackageError

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Weights are next to their configuration; consolidated.* repeats them under Mistral's names.
FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
OTHERS = ["*/*", "consolidated*"]


def is_repository(path: str | os.PathLike[str]) -> bool:
    """Whether a path does not exist and has a repository's form, org/name.

    A missing file in an existing folder is a mistake and is not looked for on the hub.
    """
    return REPOSITORY.fullmatch(str(path)) is not None and not Path(path).parent.exists()


def fetch_repository(name: str) -> Path:
    """The local folder of a repository: its safetensors, or else Meta's files in its `original/`.

    Access tokens, resuming, offline use and the cache are those of `huggingface_hub`.

    Raises MissingPackageError if that package is missing, FileNotFoundError if the repository does not exist
    or has no weights, and OSError if access is denied or the network fails.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise MissingPackageError(
            f'no folder {name} here; to download it from the Hugging Face hub: pip install -e ".[hub]"'
        ) from None

    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        folder = Path(hub.snapshot_download(name, allow_patterns=FILES, ignore_patterns=OTHERS))
        if not any(folder.glob("*.safetensors")):
            folder = Path(hub.snapshot_download(name, allow_patterns="original/*")) / "original"
    except hub.errors.GatedRepoError:
        raise PermissionError(
            f"{name} is gated: ask for access at https://huggingface.co/{name}, then log in: hf auth login"
        ) from None
    except hub.errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no folder {name} here, and no such repository on the Hugging Face hub; if it is private, "
            "log in: hf auth login"
        ) from None
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{name} could not be downloaded from the Hugging Face hub: {reason}") from None
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("consolidated.*.pth")):
        raise FileNotFoundError(
            f"{name} on the Hugging Face hub has neither *.safetensors nor original/consolidated.*.pth"
        )
    return folder
