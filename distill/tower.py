"""Trains the vision tower of the built-in scenes: a small CLIP vision model, frozen ever after.

`python -m distill.tower --out DIR --steps N` writes config.json, model.safetensors and tower.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from distill.tower_attention import BY_CELL, WHOLE, set_grid_positions, set_local_attention
from vlm.data.scenes.attributes import CLASSES, IGNORE, WITH_EMPTY, cell_attributes
from vlm.data.scenes.draw import IMAGE_SIZE, render
from vlm.data.scenes.scene import TOWER_START, VALIDATION_START, make_scene
from vlm.data.scenes.train_tokenizer import train_tokenizer
from vlm.errors import UserError
from vlm.folders import finished_folder
from vlm.manifest import CLIP_MEAN, CLIP_STD

PATCH = 4
BATCH = 32
LEARNING_RATE = 3e-3
WARM_UP_STEPS = 50
HELD_OUT = 512
SHAPE_WEIGHT = 2.0
# The first part of the steps sees crowded scenes and attends within cells only: shapes, which are slow to learn, are
# learned in a third of the time; the rest learns to find the cells in the whole picture.
BY_CELL_SHARE = 0.35
PATCH_SCALE = 5.0  # of the patches' starting weights, beside tower_attention.POSITION_SCALE
# What the VLM reads comes first; the last state is trained as well so that no layer of the tower is idle.
READOUTS = ("features", "last")
RECORD = "tower.json"


def tower_config(patch: int = PATCH) -> CLIPVisionConfig:
    """The tower's architecture: 24x24 patches and CLS, the grid of MobileVLM V2's 336/14, if patches are 4 wide."""
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )


class AttributeReader(nn.Module):
    """The tower and linear heads that read every cell's attributes from its patches; the heads are dropped later."""

    def __init__(self, tower: CLIPVisionModel) -> None:
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.heads = nn.ModuleDict(
            {f"{readout}_{name}": nn.Linear(width, CLASSES[name]) for readout in READOUTS for name in CLASSES}
        )

    def forward(self, pixel_values: Tensor) -> dict[str, dict[str, Tensor]]:
        """Logits [B, 9, classes] per readout and attribute, of CLIP-normalised pixel_values [B, 3, 96, 96]."""
        outputs = self.tower(pixel_values=pixel_values, output_hidden_states=True)
        states = {"features": outputs.hidden_states[-2], "last": outputs.last_hidden_state}
        cells = {readout: pool_cells(state[:, 1:]) for readout, state in states.items()}  # [B, 9, D]
        return {
            readout: {name: self.heads[f"{readout}_{name}"](cells[readout]) for name in CLASSES}  # [B, 9, classes]
            for readout in READOUTS
        }


def pool_cells(patches: Tensor) -> Tensor:
    """The mean over each cell of the 3x3 grid, [B, 9, D], of patch tokens [B, P, D] without CLS."""
    batch, count, width = patches.shape
    side = math.isqrt(count)
    grid = patches.transpose(1, 2).reshape(batch, width, side, side)  # [B, D, side, side]
    return F.avg_pool2d(grid, side // 3).flatten(2).transpose(1, 2)  # [B, 9, D]


def attribute_loss(logits: dict[str, dict[str, Tensor]], labels: dict[str, Tensor]) -> Tensor:
    """Sum over readouts and attributes of the mean cross-entropy; shape, the slow one, counts double."""
    total = torch.zeros(())
    for heads in logits.values():
        for name, values in heads.items():
            weight = SHAPE_WEIGHT if name == "shape" else 1.0
            loss = F.cross_entropy(values.float().flatten(0, 1), labels[name].flatten(), ignore_index=IGNORE)
            total = total + weight * torch.nan_to_num(loss)  # nan: no cell of the batch has the attribute
    return total


def make_batch(first_seed: int, size: int, *, crowded: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels [B, 3, 96, 96], normalised as CLIP does, and labels [B, 9] of `size` scenes from `first_seed` on."""
    scenes = [make_scene(first_seed + offset, crowded=crowded) for offset in range(size)]
    pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))  # [B, 96, 96, 3]
    pixels = (pixels.float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    attributes = [cell_attributes(scene) for scene in scenes]
    labels = {name: torch.from_numpy(np.stack([a[name] for a in attributes])) for name in CLASSES}  # [B, 9]
    return pixels.permute(0, 3, 1, 2).contiguous(), labels  # [B, 3, 96, 96]


@torch.no_grad()
def held_out_accuracies(reader: AttributeReader, count: int) -> dict[str, dict[str, float]]:
    """Percent right per readout and attribute on validation scenes, over the cells that have the attribute."""
    right = {readout: {name: 0 for name in CLASSES} for readout in READOUTS}
    asked = {name: 0 for name in CLASSES}
    for start in range(0, count, BATCH):
        pixels, labels = make_batch(VALIDATION_START + start, min(BATCH, count - start))
        present = {name: values > 0 if name in WITH_EMPTY else values >= 0 for name, values in labels.items()}
        for name in CLASSES:
            asked[name] += int(present[name].sum())
        for readout, heads in reader(pixels).items():
            for name, values in heads.items():
                right[readout][name] += int(((values.argmax(-1) == labels[name]) & present[name]).sum())
    return {
        readout: {name: round(100 * right[readout][name] / max(1, asked[name]), 2) for name in CLASSES}
        for readout in READOUTS
    }


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 1 % of LEARNING_RATE."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return LEARNING_RATE * warm * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def build_reader(seed: int, patch: int = PATCH) -> AttributeReader:
    """A tower with fresh weights, the same for the same seed."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(tower_config(patch))
    set_grid_positions(tower)
    set_local_attention(tower)
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight *= PATCH_SCALE
    return AttributeReader(tower)


def train_tower(
    out: Path,
    *,
    steps: int,
    seed: int = 0,
    patch: int = PATCH,
    threads: int = 2,
    held_out: int = HELD_OUT,
    init: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Trains the tower on scenes from TOWER_START on and writes it into the folder `out`; one that is there is kept.

    Args:
        out: folder to create; written as `<out>.partial` and renamed when complete.
        steps: optimiser steps of 32 scenes each, 1 or more.
        seed: of the weights and of the first scene.
        patch: width of a patch in pixels; 4, 8 or 16, so that a cell of the 3x3 grid has whole ones.
        threads: CPU threads of torch.
        held_out: how many validation scenes the accuracies are measured on.
        init: a tower to go on from, on whole pictures only; give another seed, so that the scenes are new ones.

    Returns:
        Percent right per readout ("features" is what the VLM reads) and attribute on validation scenes.

    Raises:
        UserError: `out` holds something else than this tower, `init` holds no tower.
    """
    recipe: dict[str, object] = {"steps": steps, "seed": seed, "patch": patch}
    if init is not None:
        recipe["init"] = _record(init)
        if (found := _record(init).get("patch", PATCH)) != patch:
            raise UserError(f"{init}: a tower with patches of {found}, not of {patch}. Give --patch {found}.")
    if out.exists():
        return _finished(out, recipe)
    torch.set_num_threads(threads)
    reader = build_reader(seed, patch)
    if init is not None:
        reader.tower.load_state_dict(CLIPVisionModel.from_pretrained(init).state_dict())
    started = time.monotonic()
    _optimise(reader, steps, seed, started, by_cell_steps=0 if init else round(BY_CELL_SHARE * steps))
    reader.tower.set_attn_implementation(WHOLE)
    accuracies = held_out_accuracies(reader, held_out)
    seconds = round(time.monotonic() - started, 1)
    _write(reader.tower, out, {**recipe, "seconds": seconds, "accuracies": accuracies})
    return accuracies


def _record(folder: Path) -> dict[str, Any]:
    """What is written down of a finished tower."""
    try:
        return dict(json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tower with a readable {RECORD} ({error}). Name another folder.") from error


def _finished(out: Path, recipe: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The accuracies of the tower in `out`, if it was made as `recipe` says."""
    found = _record(out)
    if _made(found) != _made(recipe):
        raise UserError(
            f"{out}: holds a tower of {_made(found)}, not of {_made(recipe)}. Remove it or choose another --out."
        )
    print(f"{out}: this tower is finished, nothing to train. Remove the folder to train it anew.", flush=True)
    return dict(found["accuracies"])


def _made(record: dict[str, Any]) -> str:
    """How a tower was made, without what differs from one making to the next."""
    text = f"{record.get('steps')} steps, seed {record.get('seed')}, patches of {record.get('patch', PATCH)}"
    return f"{text}, from ({_made(record['init'])})" if "init" in record else text


def _optimise(reader: AttributeReader, steps: int, seed: int, started: float, by_cell_steps: int) -> None:
    optimiser = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    first_seed = TOWER_START + seed * 10_000_000
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = learning_rate(step, steps)
        by_cell = step < by_cell_steps
        reader.tower.set_attn_implementation(BY_CELL if by_cell else WHOLE)
        pixels, labels = make_batch(first_seed + step * BATCH, BATCH, crowded=by_cell or step % 2 == 0)
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader(pixels)
        loss = attribute_loss(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            features = held_out_accuracies(reader, 128)["features"]
            print(f"step {step + 1}/{steps} {time.monotonic() - started:.0f} s loss {loss:.3f} {features}", flush=True)


def _write(tower: CLIPVisionModel, out: Path, facts: dict[str, object]) -> None:
    with finished_folder(out) as folder:
        tower.save_pretrained(folder)
        train_tokenizer(folder)  # beside the tower, so that a model can be built from this folder alone
        record = {"command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]), **facts}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def main() -> int:
    """The command line; exit code 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--steps", type=int, default=1300, help="optimiser steps of 32 scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patch", type=int, default=PATCH, choices=(4, 8, 16), help="width of a patch in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--init", type=Path, help="tower to go on from, on whole pictures (give another --seed)")
    arguments = parser.parse_args()
    try:
        accuracies = train_tower(**vars(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(accuracies, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
