"""Where a checkpoint is (a folder, or a name on the Hugging Face hub, downloaded once), and which layout it has."""

import json
import re
from pathlib import Path
from typing import Any

from vlm.errors import UserError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZERS = ["*.json", "*.model", "*.jinja"]


def is_hub_name(name: Path) -> bool:
    """Whether this can only be meant as "organisation/model" on the hub: there is no such folder, nor the first part.

    "runs/studnet" beside a folder runs/ is a slip of the pen.
    """
    text = str(name)
    return bool(_NAME.fullmatch(text)) and not name.exists() and not Path(text.partition("/")[0]).exists()


def locate(name: Path) -> Path:
    """Return the folder of a checkpoint.

    Args:
        name: a folder, or a name on the hub if there is no such folder here.
    Raises:
        UserError: there is neither; names what was looked for.
    """
    if not is_hub_name(name):
        return name
    try:
        return _download(str(name))
    except (OSError, ValueError) as error:  # every error of the hub is one of these
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name}: no such folder (looked in {Path.cwd()}), and as a name on the Hugging Face hub it could not be "
            f"fetched ({reason}). Give the folder of a checkpoint, correct the name, or download it where there is a "
            "network."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint.

    Raises:
        UserError: it is missing or not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: no config.json, so this is no checkpoint. `make mobile` makes one in runs/tiny/student."
        )
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not JSON ({error}). Copy the checkpoint again.") from error


def is_upstream(config: dict[str, Any]) -> bool:
    """Whether a config.json is upstream's: the decoder's sizes stand at its top, the rest in mm_* keys."""
    return "text_config" not in config and any(key.startswith("mm_") for key in config)


def _download(name: str) -> Path:
    """Fetch configuration, tokenizer and weights: safetensors where there are any, else PyTorch's files."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=[*_TOKENIZERS, "*.safetensors"]))
    if any(folder.glob("*.safetensors")):
        return folder
    return Path(snapshot_download(name, allow_patterns=[*_TOKENIZERS, "pytorch_model*.bin"]))
