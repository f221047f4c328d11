"""The push bundle: loader, C library, engine and runner for another processor, so that a device needs nothing.

Made from public packages and kept in the cache under a name made from all that goes into it.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from device_bench.devices._build import key, make
from device_bench.devices._recipe import ENGINES, OWN_RUNNERS, RECORD, Processor, Recipe, recipe
from device_bench.sensors.base import Absent
from vlm.errors import UserError
from vlm.folders import cache_folder, locked, sha256
from vlm.runtimes._executorch_library import RUNNER as RUNNER_NAME


@dataclass(frozen=True)
class Bundle:
    """A finished bundle: its files by name, and how to start its runner where they lie; loader "" is the system's."""

    engine: str
    folder: Path
    files: dict[str, Path]
    loader: str
    model: tuple[str, ...]

    def command(self, place: str) -> list[str]:
        """The words that start the runner from the folder `place` of the device."""
        loader = [f"{place}/{self.loader}", "--library-path", place] if self.loader else []
        return [*loader, f"{place}/{RUNNER_NAME}"]


def own_bundle(engine: str) -> Bundle | None:
    """What the user has built, for example with Android's NDK: a runner that finds its libraries beside it; or None.

    Raises:
        UserError: $POCKETVLM_RUNNERS is set and has no runner of this engine.
    """
    chosen = os.environ.get(OWN_RUNNERS)
    if not chosen:
        return None
    folder = Path(chosen) / engine
    if not (folder / RUNNER_NAME).is_file():
        raise UserError(
            f"{folder / RUNNER_NAME}: not there; {OWN_RUNNERS} names a folder with one folder per engine: runner and "
            "libraries. Build it (android_harness/README.md), or unset the variable."
        )
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    return Bundle(engine, folder, files, "", ENGINES[engine].model)


def bundle(engine: str, abi: str) -> Bundle:
    """Return the bundle of an engine for a processor, made now if the cache does not have it.

    Raises:
        UserError: there is none for this engine or processor, or something to make it from is missing.
    """
    how = recipe(engine, abi)
    folder = _folder(how)
    with locked(folder.with_name(f"{folder.name}.lock")):  # several devices' benches may want it at once
        if not (folder / RECORD).is_file():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as name:
                ready = make(Path(name), how)
                shutil.rmtree(folder, ignore_errors=True)
                ready.rename(folder)
    return _open(folder, engine, how.processor)


def check(engine: str, abi: str) -> None:
    """Make sure that a bundle can be made here, or is in the cache.

    Raises:
        UserError: there is none for this engine or processor, or something to make it from is missing.
    """
    how = recipe(engine, abi)
    if not (_folder(how) / RECORD).is_file():
        how.headers()


def examined(engine: str, abi: str) -> str | Absent:
    """Which runner a device with this processor would get, every file of it checked; nothing is built.

    Returns:
        Where it comes from, with versions; Absent with what must be done first, or why there can be none.
    """
    try:
        if (own := own_bundle(engine)) is not None:
            return f"your own, {own.folder}"
        how = recipe(engine, abi)
        folder = _folder(how)
        if (folder / RECORD).is_file():
            count = len(_open(folder, engine, how.processor).files)
            return f"built, {how.how.package} {how.version}, {count} files, each with the right SHA-256"
        how.headers()
        return Absent(f"not built yet; the first bench does it, or: pocketvlm bundle --abi {abi} --engine {engine}")
    except UserError as error:
        return Absent(str(error))


def _folder(how: Recipe) -> Path:
    return cache_folder() / f"bundle-{how.abi}-{how.engine}-{how.version}-{key(how)}"


def _open(folder: Path, engine: str, processor: Processor) -> Bundle:
    record = json.loads((folder / RECORD).read_text())
    files = {name: folder / name for name in record["files"]}
    for name, path in files.items():
        if not path.is_file() or sha256(path) != record["files"][name]:
            raise UserError(f"{path}: damaged. Remove {folder}, and it is made anew.")
    return Bundle(engine, folder, files, processor.loader, ENGINES[engine].model)
