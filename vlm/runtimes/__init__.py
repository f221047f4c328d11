"""Engines that answer a question about an image from an artifact folder alone; one file each, found by name."""

from pathlib import Path

from vlm.errors import UserError
from vlm.manifest import MANIFEST, read_manifest
from vlm.registry import load
from vlm.runtimes.base import Runtime


def open_runtime(folder: Path, threads: int = 2) -> Runtime:
    """Open an artifact with the engine its manifest names, or a checkpoint with torch.

    Args:
        folder: an artifact (manifest.json) or a checkpoint (config.json).
        threads: CPU threads of the engine.
    Raises:
        UserError: neither is there, a file is damaged, or the engine is not installed (the message says what to type).
    """
    if (folder / MANIFEST).is_file():
        engine: str = read_manifest(folder).engine
    elif (folder / "config.json").is_file():
        engine = "torch"
    else:
        raise UserError(f"{folder}: neither an artifact (manifest.json) nor a checkpoint (config.json).")
    try:
        module = load("vlm.runtimes", engine)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{folder}: needs {error.name}, which is not installed: pip install 'pocketvlm[{engine}]'."
        ) from error
    return module.open(folder, threads)
