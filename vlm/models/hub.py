"""Where a checkpoint is: a folder, or a name on the Hugging Face hub, which is downloaded once."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from vlm.errors import UserError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZERS = ["*.json", "*.model", "*.jinja"]


def locate(name: Path) -> Path:
    """Return the folder of a checkpoint.

    Args:
        name: a folder, or "organisation/model" on the hub if there is no such folder here.
    Raises:
        UserError: there is neither; names what was looked for.
    """
    text = str(name)
    # "runs/studnet" beside a folder runs/ is a slip of the pen, not a name on the hub.
    if name.exists() or not _NAME.fullmatch(text) or Path(text.partition("/")[0]).exists():
        return name
    try:
        return _download(text)
    except (HFValidationError, OSError) as error:  # every other error of the hub is an OSError
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{text}: no such folder, and as a name on the Hugging Face hub it could not be fetched ({reason}). Give "
            "the folder of a checkpoint, correct the name, or download it where there is a network."
        ) from error


def _download(name: str) -> Path:
    """Fetch configuration, tokenizer and weights: safetensors where there are any, else PyTorch's files."""
    folder = Path(snapshot_download(name, allow_patterns=[*_TOKENIZERS, "*.safetensors"]))
    if any(folder.glob("*.safetensors")):
        return folder
    return Path(snapshot_download(name, allow_patterns=[*_TOKENIZERS, "pytorch_model*.bin"]))
