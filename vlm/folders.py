"""Finished folders: a stage writes into `<out>.partial` and renames at the end, so a folder that exists is complete."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.errors import UserError

_CHUNK = 1 << 20


@contextmanager
def finished_folder(out: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield `<out>.partial` to write into and rename it to `out` when the block ends well.

    Args:
        out: the folder that shall exist only when it is complete; an older one is replaced at the rename.
        resume: keep what an interrupted run left in `<out>.partial` instead of starting empty.
    Raises:
        UserError: the disk is full; names the folder and what to do.
    """
    partial = out.with_name(out.name + ".partial")
    if partial.exists() and not resume:
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(out.parent).free // 2**20
        raise UserError(
            f"{out}: the disk is full ({free} MiB free). Free some space and run the command again."
        ) from error


def cache_folder() -> Path:
    """Return where what can be made again is kept: $POCKETVLM_CACHE, else ~/.cache/pocketvlm."""
    chosen = os.environ.get("POCKETVLM_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "pocketvlm"


@contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that only one process can have and that goes with the process, however it ends.

    Args:
        file: of the lock; made if need be, with its folder. It says which process holds the lock.
        wait: for the process that holds it, instead of giving up.
    Raises:
        UserError: another process holds the lock and it was not to be waited for.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UserError(
                f"{file.parent}: another run (process {lock.read().strip() or 'unknown'}) works in this folder. Wait "
                "for it or choose another --out."
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".partial")
    if isinstance(content, str):
        temporary.write_text(content)
    else:
        temporary.write_bytes(content)
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tree_sha256(folder: Path) -> str:
    """Return one SHA-256 over the relative names and contents of every file below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Flush every file to the disk, so that a full disk is noticed before the rename and not after it."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
