"""Any checkpoint that is understood, as a folder in transformers' layout: converted once, then found again."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from vlm.folders import cache_folder, locked
from vlm.models.hub import is_hub_name, is_upstream, locate, read_config

Progress = Callable[[float, str], None]


def is_prepared(name: Path) -> bool:
    """Whether nothing has to be fetched or converted, as for artifacts and what is not there at all."""
    return not is_hub_name(name) and not ((name / "config.json").is_file() and is_upstream(read_config(name)))


def prepared(name: Path, progress: Progress | None = None) -> Path:
    """Return a folder in transformers' layout with the checkpoint `name`.

    A checkpoint in upstream's layout is converted into the cache (POCKETVLM_CACHE, else ~/.cache/pocketvlm), which
    takes as much room as it has itself. Processes that ask at the same time wait for the one that converts.

    Args:
        name: a folder in either layout, or a hub name.
        progress: told the share of a conversion that is done.
    Raises:
        UserError: there is no such checkpoint, or it cannot be converted.
    """
    folder = locate(name)
    if not is_upstream(read_config(folder)):
        return folder
    from vlm.models.from_upstream import to_hf  # torch, which what is prepared does not need

    out = cache_folder() / f"{name.name}-{_fingerprint(folder)}"
    with locked(out.with_name(f"{out.name}.lock")):
        if not out.exists():
            to_hf(folder, out, progress=progress)
    return out


def _fingerprint(folder: Path) -> str:
    """A short hash of the files that a conversion reads, by name, size and time: another checkpoint, another hash."""
    from vlm.models.tensors import weight_files

    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*.model")), *weight_files(folder)]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(f"{folder.resolve()} {stats}".encode()).hexdigest()[:12]
