"""Where a checkpoint is: a folder, or a name on the Hugging Face hub, which is downloaded once."""

import re
from pathlib import Path

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
            f"{name}: no such folder, and as a name on the Hugging Face hub it could not be fetched ({reason}). Give "
            "the folder of a checkpoint, correct the name, or download it where there is a network."
        ) from error


def _download(name: str) -> Path:
    """Fetch configuration, tokenizer and weights: safetensors where there are any, else PyTorch's files."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=[*_TOKENIZERS, "*.safetensors"]))
    if any(folder.glob("*.safetensors")):
        return folder
    return Path(snapshot_download(name, allow_patterns=[*_TOKENIZERS, "pytorch_model*.bin"]))
