"""Reads what the stages left in a run folder; a file that is not there is None, a file that is broken is an error."""

import json
import math
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import UserError
from vlm.manifest import MANIFEST

Tree = dict[str, Any]

# First part of a parameter's name in the Hugging Face layout -> the component it belongs to.
_PARTS = {
    "vision_tower": "vision",
    "multi_modal_projector": "projector",
    "language_model": "decoder",
    "lm_head": "decoder",
}


def read_json(path: Path) -> Any:
    """Parse a JSON file, or return None where it does not exist; a NaN in it becomes None.

    Raises:
        UserError: the file is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(), parse_constant=lambda _: None)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}). Delete it and run the stage that writes it again.") from error


def run_names(folders: Sequence[Path]) -> dict[Path, str]:
    """What a report calls some folders: their names, or with the folder above where two are called the same.

    Raises:
        UserError: two folders could not be told apart by that either.
    """
    places = [folder.resolve() for folder in folders]
    plain = [place.name for place in places]
    names = [
        name if plain.count(name) == 1 else f"{place.parent.name}/{name}"
        for name, place in zip(plain, places, strict=True)
    ]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two folders are named {doubled[0]!r}, a reader could not tell them apart. Rename one.")
    return dict(zip(folders, names, strict=True))


def evaluation_folder(checkpoint: Path) -> Path:
    """Where a checkpoint's eval.json lies: in evaluations/ beside it, as runs have it, or in the checkpoint itself."""
    beside = checkpoint.parent / "evaluations" / checkpoint.name
    return beside if beside.is_dir() else checkpoint


def read_config(folder: Path) -> Tree:
    """The run's config.yaml as a plain tree, empty where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not a readable YAML file: {error}") from error
    return tree if isinstance(tree, dict) else {}


def result_files(folder: Path) -> list[Path]:
    """The bench results of a run folder (results/<device>/*.json) or of a plain bench folder (<device>/*.json)."""
    root = folder / "results" if (folder / "results").is_dir() else folder
    return sorted(path for path in root.glob("*/*.json") if _is_result(path))


def _is_result(path: Path) -> bool:
    if path.name == MANIFEST or path.name.endswith(".samples.json"):
        return False
    content = read_json(path)
    return isinstance(content, dict) and "artifact" in content and "device" in content


def parameters(checkpoint: Path) -> dict[str, int] | None:
    """Count the parameters of a checkpoint from the headers of its safetensors files, without loading them.

    Returns:
        Number of parameters per component (vision, projector, decoder, other), or None where there are no weights.
    """
    counts: dict[str, int] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, entry in _header(path).items():
            if name != "__metadata__":
                part = next((_PARTS[piece] for piece in name.split(".") if piece in _PARTS), "other")
                counts[part] = counts.get(part, 0) + math.prod(entry["shape"])
    return counts or None


def _header(path: Path) -> Tree:
    """The JSON header of a safetensors file: its length as 8 bytes, little endian, then the text."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: Tree = json.loads(file.read(min(length, path.stat().st_size)))
    except (struct.error, ValueError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}). Train or download the checkpoint again.") from error
    return header


def find_checkpoint(name: str | None, run: Path) -> Path | None:
    """Where a checkpoint named in a configuration lies: as it stands, or relative to a folder above the run."""
    if not name:
        return None
    candidates = [Path(name), *(parent / name for parent in run.resolve().parents)]
    return next((path for path in candidates if path.is_dir()), None)


def git_state(folder: Path) -> Tree | None:
    """Commit of the source tree and whether it had changes, or None where git does not know the folder."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
