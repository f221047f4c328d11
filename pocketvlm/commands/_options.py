"""What several commands share."""

from pathlib import Path
from typing import Any


def given(**options: Any) -> dict[str, Any]:
    """Keep the options that were typed; the others have their defaults in the stage's configuration."""
    return {name: value for name, value in options.items() if value is not None}


def ready(model: Path, quiet: bool) -> None:
    """Fetch and convert a checkpoint if that must be done first, and show how far it is.

    Raises:
        UserError: there is no such checkpoint, or it cannot be converted; a library is not installed.
    """
    from pocketvlm.console import quietly
    from pocketvlm.progress import Progress
    from vlm.errors import UserError, install_hint
    from vlm.models.prepared import is_prepared, prepared

    if is_prepared(model):
        return
    with Progress(quiet=quiet) as progress, quietly():
        progress.single(f"convert {model}, once", 60.0)
        try:
            prepared(model, progress.update)
        except ModuleNotFoundError as error:
            raise UserError(f"{model}: needs {error.name}, which is not installed: {install_hint('torch')}.") from error


def names(text: str | None) -> list[str] | None:
    """Split a list separated by commas; None stays None, an empty text is an empty list."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
