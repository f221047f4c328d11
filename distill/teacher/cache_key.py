"""What a cache of the teacher's outputs was made for, so that one that was made for something else is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

from distill.config import DistillConfig, Stage
from distill.teacher.cache import MANIFEST, CachedTeacher, again
from vlm.errors import UserError
from vlm.folders import sha256
from vlm.manifest import Preprocessing
from vlm.models.prepared import prepared

PIECES, PIECE = 64, 2**16  # how many, and bytes of each


def identity(config: DistillConfig, max_length: int, preprocessing: Preprocessing) -> dict[str, Any]:
    """What the outputs depend on, by the name under which a difference is reported.

    Args:
        config: of a run with a cache.
        max_length: the student's context in tokens, which decides on the turns that are left out.
        preprocessing: how a picture becomes the pixels that the shared tower sees.
    """
    cache, attention, logits = config.cache, config.attention, config.logits
    assert cache is not None and config.teacher is not None
    found: dict[str, Any] = {
        "the teacher": fingerprint(prepared(Path(config.teacher))),
        "the context length": max_length,
        "how pictures are prepared": preprocessing.model_dump(mode="json"),
        "cache.kind": cache.kind,
        "cache.shard_records": cache.shard_records,
        "precision": config.precision,
        "teacher_bits": config.teacher_bits,
        "the layers and blocks of attention": [[name, layers] for name, _, layers in blocks_of(config)],
        "attention.block": attention.block if attention else None,
        "vision_tokens": config.vision_tokens is not None,
        "logits.tokens": logits.tokens if logits else None,
    }
    if config.vision_logits:
        found["vision_logits"] = True
    if cache.kind == "compact" and logits:
        found |= {"cache.top_k": cache.top_k, "logits.temperature": logits.temperature}
    return found | {f"the data of stage {stage.name}": data_sha256(stage) for stage in config.stages}


def fingerprint(folder: Path) -> str:
    """Hash of a checkpoint's file names and sizes and of pieces all over each file: a 7B teacher is 14 GB, and training
    changes every weight."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\n".encode())
        with path.open("rb") as file:
            for number in range(PIECES):
                file.seek(max(0, size - PIECE) * number // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def data_sha256(stage: Stage) -> str:
    """Hash of a stage's data: its configuration and the content of its records files (not of the images)."""
    data = stage.data
    tree = data.model_dump(mode="json", exclude={"max_broken", "cache", "recipe"})
    files = [sha256(Path(part.records)) for part in data.all_parts()]
    return hashlib.sha256(json.dumps([tree, files]).encode()).hexdigest()


def blocks_of(config: DistillConfig) -> list[tuple[str, Any, list[int]]]:
    """(name in the cache, block, the teacher's layers) of each block of attention that the terms read."""
    attention, vision = config.attention, config.vision_tokens
    found: dict[str, tuple[Any, list[int]]] = {}
    if attention:
        name = "text_vision" if attention.block == "text_vision" else "square"
        found[name] = (attention.block, attention.teacher_layers)
    if vision and vision.reads_attention and "text_vision" not in found:
        found["text_vision"] = ("text_vision", attention.teacher_layers[:1] if attention else [0])
    return [(name, block, layers) for name, (block, layers) in found.items()]


def open_cache(config: DistillConfig, max_length: int, preprocessing: Preprocessing) -> CachedTeacher | None:
    """The complete cache of a run; None if it must be made. Arguments as of `identity`.

    Raises:
        UserError: the folder's cache was made for something else; names what.
    """
    assert config.cache is not None
    folder = Path(config.cache.folder)
    if (folder / MANIFEST).is_file():
        compare(folder, identity(config, max_length, preprocessing))
        return CachedTeacher(folder)
    return None


def compare(folder: Path, wanted: dict[str, Any], name: str = MANIFEST) -> None:
    """Refuse a cache that was made for something else."""
    found = json.loads((folder / name).read_text())["identity"]
    for what in wanted.keys() | found.keys():
        if found.get(what) != wanted.get(what):
            raise UserError(
                f"{folder}: this cache of the teacher's outputs is stale: {what}: {found.get(what)} found, "
                f"{wanted.get(what)} expected. {again(folder)}"
            )
