"""Stamps: what each finished thing of a run was made from, so that a second call knows what still holds."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlm.config import Config
from vlm.errors import UserError
from vlm.folders import sha256, write_atomic
from vlm.models.hub import is_hub_name

_HASHED_BYTES = 256 << 20  # more is not read, so that a call with nothing to do stays short
_CHECKPOINTS = ("teacher", "student", "vision")  # keys that may also name a checkpoint on the hub


class Stamp(Config):
    """One product's record in stages/<product>.json.

    Attributes:
        inputs: what it is made from, each as a hash or build id: config, code, files, and one per upstream product.
        build: unique id of this building; dependents record it.
        paths: files and folders it consists of, relative to the run folder.
        seconds: wall time of the step; null when the finished thing was found after a kill.
        finished: ISO time; null while it is being built, which is how a kill shows.
    """

    inputs: dict[str, str]
    build: str
    paths: list[str] = []
    seconds: float | None = None
    finished: str | None = None


def new_stamp(inputs: dict[str, str]) -> Stamp:
    """A stamp of something that begins now."""
    return Stamp(inputs=inputs, build=uuid.uuid4().hex[:12])


def finish(stamp: Stamp, paths: list[str], seconds: float | None) -> Stamp:
    """The same stamp, finished now."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return stamp.model_copy(update={"paths": paths, "seconds": seconds, "finished": now})


def read_stamp(path: Path) -> Stamp | None:
    """Read a stamp; None when there is none or it is unreadable, which means: build again."""
    try:
        return Stamp.model_validate_json(path.read_text())
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Write a stamp, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, stamp.model_dump_json(indent=1) + "\n")


def text_hash(value: Any) -> str:
    """Hash anything JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def input_files(paths: dict[str, str | None]) -> str:
    """Hash the content of the files and folders that a configuration names.

    Args:
        paths: configuration key -> path; None is left out; a checkpoint's name on the hub stands for itself.
    Raises:
        UserError: one does not exist; the message names the key.
    """
    found = {}
    for key, name in paths.items():
        if name is None:
            continue
        if key.endswith(_CHECKPOINTS) and is_hub_name(Path(name)):
            found[key] = name
            continue
        if not Path(name).exists():
            raise UserError(
                f"{key}: {name} does not exist (looked in {Path.cwd()}). Correct the key, or call pocketvlm from the "
                "folder that the path is relative to."
            )
        found[key] = fingerprint(Path(name))
    return text_hash(found)


def fingerprint(path: Path) -> str:
    """Hash a file or the files below a folder: by content, more than 256 MiB by name, size and modification time."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    status = [file.stat() for file in files]
    by_content = sum(entry.st_size for entry in status) <= _HASHED_BYTES
    return text_hash(
        [
            [file.relative_to(path).as_posix(), sha256(file) if by_content else f"{entry.st_size} {entry.st_mtime_ns}"]
            for file, entry in zip(files, status, strict=True)
        ]
    )
