"""Engines that answer a question about an image from an artifact folder alone; one file each, found by name."""

from pathlib import Path
from types import ModuleType

from vlm.errors import UserError, install_hint
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
    module: ModuleType = _engine(folder)
    runtime: Runtime = module.open(folder, threads)
    return runtime


def prepare(folder: Path) -> None:
    """Check every byte of an artifact, and let its engine do what it does once per machine, such as compiling itself.

    A checkpoint needs no preparation. An engine's module may have `prepare()`.

    Raises:
        UserError: as `open_runtime` does, or a file is not the one that was exported.
    """
    if not (folder / MANIFEST).is_file():
        return
    read_manifest(folder, checksums=True)
    module = _engine(folder)
    if hasattr(module, "prepare"):
        module.prepare()


def _engine(folder: Path) -> ModuleType:
    if (folder / MANIFEST).is_file():
        engine: str = read_manifest(folder).engine
    elif (folder / "config.json").is_file():
        engine = "torch"
    else:
        raise UserError(f"{folder}: neither an artifact (manifest.json) nor a checkpoint (config.json).")
    try:
        return load("vlm.runtimes", engine)
    except ModuleNotFoundError as error:
        raise UserError(f"{folder}: needs {error.name}, which is not installed: {install_hint(engine)}.") from error
