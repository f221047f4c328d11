"""Checkpoints in transformers' layout become upstream's, tensor by tensor: what upstream's own scripts load."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, LlavaConfig

from vlm.errors import UserError
from vlm.folders import finished_folder
from vlm.models import tokenizers, upstream
from vlm.models.clip import KNOWN
from vlm.models.from_upstream import Progress
from vlm.models.hub import is_upstream, locate, read_config
from vlm.models.processor import read_preprocessing
from vlm.models.tensors import SHARD_BYTES, check_fit, counted, shapes, tensors, write_tensors


def to_upstream(
    source: Path,
    out: Path,
    vision: Path | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Convert a MobileVLM or LLaVA-1.5 from transformers' layout to upstream's.

    Weights keep their values and types; the embeddings' rows for <image> and after it are left out.

    Args:
        source: folder or hub name.
        out: the folder to make.
        vision: name of the CLIP that config.json shall give, for a checkpoint that was not imported and whose tower is
            none of CLIP's; upstream reads its sizes and its preprocessing from there.
        progress: told the share that is done, and the tensor.
        shard_bytes: greatest size of one file of weights, which is also what stands in memory at once.
    Raises:
        UserError: the architecture has no upstream layout, or tensors are missing, extra or misshaped.
    """
    source = locate(source)
    config = _config(source)
    projector = upstream.family_of(config).projector
    imported = getattr(config, "upstream", None) or {}
    rows = imported.get("vocab_size", config.image_token_id)
    found = {upstream.to_upstream_name(name, projector): shape for name, shape in shapes(source).items()}
    check_fit(upstream.expected_shapes(config, config.text_config.vocab_size), found, str(source))

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors(source):
            theirs = upstream.to_upstream_name(name, projector)
            yield theirs, tensor[:rows] if theirs in (upstream.EMBEDDING, upstream.HEAD) else tensor

    padded = read_preprocessing(source, config.vision_config.image_size).square == "pad"
    made = upstream.upstream_config(config, tower_name(config, vision, source / "config.json"), rows, padded)
    with finished_folder(out) as folder:
        write_tensors(counted(stream(), sum(map(prod, found.values())), progress), folder, shard_bytes)
        (folder / "config.json").write_text(json.dumps(made, indent=2, sort_keys=True) + "\n")
        tokenizers.to_upstream(source, folder)
    return out


def _config(source: Path) -> LlavaConfig:
    """Read the configuration of a checkpoint that has an upstream layout."""
    file, told = source / "config.json", read_config(source)
    if is_upstream(told):
        raise UserError(f"{file}: this is upstream's layout already.")
    if told.get("model_type") not in ("mobilevlm", "llava"):
        raise UserError(
            f"{file}: model_type {told.get('model_type')!r} has no upstream layout, expected mobilevlm or llava."
        )
    return AutoConfig.from_pretrained(source)


def tower_name(config: LlavaConfig, vision: Path | None, file: Path) -> str:
    """The name of the CLIP that upstream is to read sizes and preprocessing from.

    Raises:
        UserError: none was given and none is known.
    """
    imported = getattr(config, "upstream", None) or {}
    if vision or imported.get("mm_vision_tower"):
        return str(vision or imported["mm_vision_tower"])
    ours = config.vision_config.to_dict()
    for name, sizes in KNOWN.items():
        if all(ours.get(key) == value for key, value in sizes.items() if key != "projection_dim"):
            return name
    raise UserError(
        f"{file}: upstream's config.json names its vision tower's CLIP, and this tower is none of {', '.join(KNOWN)}. "
        "Give the name or the folder of its CLIP with --vision."
    )
