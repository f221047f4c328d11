"""Engines that answer a question about an image from an artifact folder alone; one file each, found by name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from vlm.errors import UserError, install_hint
from vlm.manifest import MANIFEST, read_manifest
from vlm.models.hub import is_hub_name
from vlm.registry import load
from vlm.runtimes.base import Runtime

# ONNX Runtime 1.31 sends and stores telemetry unless it is told not to before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def open_runtime(folder: Path, threads: int = 2) -> Runtime:
    """Open an artifact with the engine its manifest names, or a checkpoint with torch.

    Args:
        folder: an artifact (manifest.json) or a checkpoint (config.json, or a name on the hub).
        threads: CPU threads of the engine.
    Raises:
        UserError: neither is there, a file is damaged, or the engine is not installed (the message says what to type).
    """
    engine = _engine(folder)
    with _installed(folder, engine):
        runtime: Runtime = _module(engine).open(folder, threads)
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
    engine = _engine(folder)
    with _installed(folder, engine):
        module = _module(engine)
        if hasattr(module, "prepare"):
            module.prepare()


def _engine(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).engine
    if (folder / "config.json").is_file() or is_hub_name(folder):
        return "torch"
    raise UserError(f"{folder}: neither an artifact (manifest.json) nor a checkpoint (config.json).")


def _module(engine: str) -> ModuleType:
    return load("vlm.runtimes", engine)


@contextmanager
def _installed(folder: Path, engine: str) -> Iterator[None]:
    """Say what to type where a library of the engine is missing; some are imported only when an artifact is opened."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{folder}: needs {error.name}, which is not installed: {install_hint(engine)}.") from error
