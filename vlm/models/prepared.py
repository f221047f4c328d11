"""Any checkpoint that is understood, as a folder in transformers' layout: converted once, then found again."""

import hashlib
import logging
from pathlib import Path

from vlm.folders import cache_folder, locked
from vlm.models import upstream
from vlm.models.hub import locate
from vlm.models.importing import Progress, read_config, to_hf
from vlm.models.tensors import weight_files

_log = logging.getLogger(__name__)


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
    if not upstream.is_upstream(read_config(folder)):
        return folder
    out = cache_folder() / f"{name.name}-{_fingerprint(folder)}"
    with locked(out.with_name(f"{out.name}.lock")):
        if not out.exists():
            _log.warning("%s is in upstream's layout: converting it once, into %s", folder, out)
            to_hf(folder, out, progress=progress)
    return out


def _fingerprint(folder: Path) -> str:
    """A short hash of the files that a conversion reads, by name, size and time: another checkpoint, another hash."""
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*.model")), *weight_files(folder)]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(f"{folder.resolve()} {stats}".encode()).hexdigest()[:12]
