"""Upstream's checkpoints become transformers', tensor by tensor: a 7B model never stands in memory."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, GenerationConfig, LlavaConfig, PreTrainedTokenizerBase

from vlm.errors import UserError
from vlm.folders import finished_folder
from vlm.manifest import Preprocessing
from vlm.models import tokenizers, upstream
from vlm.models.hub import is_upstream, locate, read_config
from vlm.models.processor import PREPROCESSOR, read_preprocessing, save_processor
from vlm.models.tensors import SHARD_BYTES, check_fit, check_numbers, counted, tensors, write_tensors
from vlm.prompts import IMAGE

ROWS = 64  # the vocabulary is filled up to a multiple of this, as in transformers' LLaVA-1.5
_NOT_VISION = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Tower:
    """A vision tower: transformers' configuration, and the CLIP it is read from unless that is built in here."""

    sizes: dict[str, Any]
    folder: Path | None


@dataclass(frozen=True)
class Plan:
    """What a conversion knows before it touches a weight.

    Attributes:
        told: upstream's config.json.
        config: transformers' configuration.
        tokenizer: with <image> and <pad>.
        tower: the vision tower.
        separate: the CLIP that the tower's weights come from; None if the checkpoint holds them.
        numbers: how many numbers all tensors hold.
    """

    told: dict[str, Any]
    config: LlavaConfig
    tokenizer: PreTrainedTokenizerBase
    tower: Tower
    separate: Path | None
    numbers: int


def to_hf(
    source: Path,
    out: Path,
    vision: Path | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Convert a checkpoint in upstream's layout to transformers'.

    Weights keep their values and types. <image> and <pad> get ids after the tokenizer's own; the rows that the
    embeddings get for them hold the mean of the others: such a token's logit is the mean logit, never the greatest.

    Args:
        source: folder or hub name.
        out: the folder to make.
        vision: folder or hub name of the CLIP, for a checkpoint without vision weights or with an unknown tower.
        progress: told the share that is done, and the tensor.
        shard_bytes: greatest size of one file of weights, which is also what stands in memory at once.
    Raises:
        UserError: the checkpoint is not upstream's, asks for what is not supported, or has missing, extra or misshaped
            tensors, all of which are listed, or one that holds no finite numbers.
    """
    source = locate(source)
    plan = _plan(source, vision)
    with finished_folder(out) as folder:
        write_tensors(counted(_stream(source, plan), plan.numbers, progress), folder, shard_bytes)
        plan.config.save_pretrained(folder)
        ids = {key: plan.told.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)
        shutil.copyfile(source / tokenizers.MODEL, folder / tokenizers.MODEL)
        save_processor(plan.config, plan.tokenizer, _preprocessing(plan.told, plan.tower), folder)
    return out


def _plan(source: Path, vision: Path | None) -> Plan:
    """Read everything but the weights, and see that the weights fit."""
    file = source / "config.json"
    told = read_config(source)
    if not is_upstream(told):
        raise UserError(f"{file}: no mm_* keys, so this is not upstream's layout and needs no conversion to hf.")
    family = upstream.check(told, file)
    found = {name: tuple(tensor.shape) for name, tensor in upstream_tensors(source)}
    has_tower = any(name.startswith(upstream.TOWER) for name in found)
    tower = find_tower(told, file, vision, has_tower)
    separate = None if has_tower else tower.folder
    if separate:
        found |= {name: tuple(tensor.shape) for name, tensor in clip_tensors(separate)}
    tokenizer = tokenizers.from_upstream(source, told["vocab_size"])
    rows = -(-max(len(tokenizer), told["vocab_size"]) // ROWS) * ROWS
    try:
        config = upstream.build_config(told, tower.sizes, rows, tokenizer.convert_tokens_to_ids(IMAGE), file)
        expected = upstream.expected_shapes(config, told["vocab_size"])
    except UserError:
        raise
    except Exception as error:  # each of transformers' classes has its own way to refuse a value
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file}: transformers makes no model of these values ({type(error).__name__}: {reason}). Take config.json "
            "of the published checkpoint."
        ) from error
    config.architectures = [family.model.__name__]
    where = f"{source} and {separate}" if separate else str(source)
    check_fit(expected, found, where)
    return Plan(told, config, tokenizer, tower, separate, sum(map(prod, found.values())))


def _stream(source: Path, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of transformers' model, one at a time."""
    projector, rows = upstream.family_of(plan.config).projector, plan.config.text_config.vocab_size
    for name, tensor in upstream_tensors(source):
        check_numbers(name, tensor, str(source))
        vocabulary = name in (upstream.EMBEDDING, upstream.HEAD)
        yield upstream.to_our_name(name, projector), grow(tensor, rows) if vocabulary else tensor
    for name, tensor in clip_tensors(plan.separate) if plan.separate else ():
        check_numbers(name, tensor, str(plan.separate))
        yield upstream.to_our_name(name, projector), tensor


def find_tower(told: dict[str, Any], file: Path, vision: Path | None, has_weights: bool) -> Tower:
    """Find the vision tower of an upstream checkpoint: where the user says, else where its configuration says.

    Raises:
        UserError: it is not there.
    """
    name = vision or Path(told.get("mm_vision_tower") or "")
    sizes = upstream.vision_sizes(str(name))
    if has_weights and vision is None and sizes:
        return Tower(sizes, None)
    lack = "the size of its vision tower" if has_weights else "the weights of its vision tower"
    try:
        folder = locate(name)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json there.")
    except UserError as error:
        raise UserError(
            f"{file}: {lack} must come from {str(name)!r}. {error} Give the CLIP's folder or hub name with --vision."
        ) from error
    return Tower(CLIPVisionConfig.from_pretrained(folder).to_dict(), folder)


def upstream_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint in upstream's layout, by the names that the published ones have."""
    for name, tensor in tensors(folder):
        if not upstream.is_buffer(name):
            yield upstream.published_name(name), tensor


def clip_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the vision tower's tensors of a CLIP, by upstream's names."""
    for name, tensor in tensors(folder):
        if not name.startswith(_NOT_VISION) and not upstream.is_buffer(f".{name}"):
            yield upstream.TOWER + name.removeprefix("vision_model."), tensor


def grow(table: Tensor, rows: int) -> Tensor:
    """Add rows to a table [R, D] up to `rows`, each the mean of those there are."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)  # [1, D]
    return torch.cat([table, mean.expand(rows - len(table), -1)])  # [rows, D]


def _preprocessing(told: dict[str, Any], tower: Tower) -> Preprocessing:
    """CLIP's scaling, and the square that the checkpoint was trained with."""
    size = tower.sizes["image_size"]
    clip = Preprocessing(size=size)
    if tower.folder and (tower.folder / PREPROCESSOR).is_file():
        clip = read_preprocessing(tower.folder, size)
    return clip.model_copy(update={"square": "pad" if told.get("image_aspect_ratio") == "pad" else "crop"})
