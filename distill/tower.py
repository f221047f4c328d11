"""Trains the vision tower of the built-in scenes: a small CLIP vision model, frozen ever after.

`python -m distill.tower --out DIR --steps N` writes config.json, model.safetensors and tower.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, CLIPVisionConfig, CLIPVisionModel

from vlm.data.scenes.attributes import CLASSES, IGNORE, WITH_EMPTY, cell_attributes
from vlm.data.scenes.draw import IMAGE_SIZE, render
from vlm.data.scenes.scene import TOWER_START, VALIDATION_START, make_scene
from vlm.data.scenes.tokenizer import train_tokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH = 4
BATCH = 32
LEARNING_RATE = 3e-3
WARM_UP_STEPS = 50
HELD_OUT = 512
SHAPE_WEIGHT = 2.0
# The first part of the steps sees crowded scenes and attends within cells only: shapes, which are slow to learn, are
# learned in a third of the time; the rest learns to find the cells in the whole picture.
BY_CELL_SHARE = 0.35
# Starting sizes of positions and patches: of the same order, so that neither drowns the other.
POSITION_SCALE = 0.7
PATCH_SCALE = 5.0
# Strength with which queries and keys start out comparing positions, and the first of the four frequencies compared:
# attention then begins local (about 45 % of it within the own cell instead of 11 %), and what was learned within cells
# survives the change to the whole picture.
LOCALITY = 3.0
LOCAL_FREQUENCY = 8
# What the VLM reads comes first; the last state is trained as well so that no layer of the tower is idle.
READOUTS = ("features", "last")
RECORD = "tower.json"


def tower_config() -> CLIPVisionConfig:
    """The tower's architecture: 24x24 patches and CLS, the grid of MobileVLM V2's 336/14."""
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
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


def set_grid_positions(tower: CLIPVisionModel) -> None:
    """Starts the patches' position embeddings as 2-D sines, so that the grid need not be discovered."""
    weight = tower.embeddings.position_embedding.weight  # [1 + P, D]
    side, quarter = math.isqrt(weight.shape[0] - 1), weight.shape[1] // 4
    frequencies = (math.pi / 2) / 16 ** (torch.arange(quarter) / quarter)  # [D/4]
    angles = torch.arange(side)[:, None] * frequencies  # [side, D/4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D/2]
    rows, columns = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)  # [P, D/2]
    with torch.no_grad():
        weight[1:] = POSITION_SCALE * torch.cat([rows, columns], dim=1)  # [P, D]


def set_local_attention(tower: CLIPVisionModel) -> None:
    """Starts every head comparing positions: q.k then falls with the distance of two patches (sums of cosines of it)."""
    quarter = tower.config.hidden_size // 4  # sine and cosine of rows, sine and cosine of columns
    size = tower.config.hidden_size // tower.config.num_attention_heads
    count = size // 4
    rows = torch.arange(tower.config.hidden_size)
    part, frequency = rows % size // count, rows % count  # which wave each query dimension reads
    columns = part * quarter + LOCAL_FREQUENCY + frequency
    for layer in tower.encoder.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight[rows, columns] += LOCALITY
            layer.self_attn.k_proj.weight[rows, columns] += LOCALITY


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: object
) -> tuple[Tensor, None]:
    """Attention in float32 inside bfloat16 autocast: on CPU its backward is 1.7 times faster than bfloat16's.

    Args:
        module, attention_mask, _: unused, they belong to the signature of transformers' attention interface.
        query, key, value: [B, H, N, D/H] in any float type.
    """
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())  # [B, H, N, D/H]
    return mixed.transpose(1, 2).contiguous(), None  # [B, N, H, D/H]


def attention_by_cell(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: object
) -> tuple[Tensor, None]:
    """Attention of every patch to its own cell alone, and of CLS to all: arguments and result as `attention`."""
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()  # [B, H, N, D/H]
        whole = F.scaled_dot_product_attention(query[:, :, :1], key, value)  # [B, H, 1, D/H]
        queries, keys, values = (_split_cells(states[:, :, 1:]) for states in (query, key, value))
        mixed = F.scaled_dot_product_attention(queries, keys, values)  # [B*9, H, P/9, D/H]
    mixed = torch.cat([whole, _join_cells(mixed)], dim=2)  # [B, H, N, D/H]
    return mixed.transpose(1, 2).contiguous(), None  # [B, N, H, D/H]


def _split_cells(patches: Tensor) -> Tensor:
    """[B, H, P, d] -> [B*9, H, P/9, d], the patches of each cell together."""
    batch, heads, count, width = patches.shape
    side = math.isqrt(count) // 3
    grid = patches.reshape(batch, heads, 3, side, 3, side, width)
    return grid.permute(0, 2, 4, 1, 3, 5, 6).reshape(batch * 9, heads, side * side, width)


def _join_cells(cells: Tensor) -> Tensor:
    """[B*9, H, P/9, d] -> [B, H, P, d], the inverse of `_split_cells`."""
    count, heads, patches, width = cells.shape
    side = math.isqrt(patches)
    grid = cells.reshape(count // 9, 3, 3, heads, side, side, width)
    return grid.permute(0, 3, 1, 4, 2, 5, 6).reshape(count // 9, heads, patches * 9, width)


AttentionInterface.register("whole", attention)
AttentionInterface.register("by_cell", attention_by_cell)


def build_reader(seed: int) -> AttributeReader:
    """A tower with fresh weights, the same for the same seed."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(tower_config())
    set_grid_positions(tower)
    set_local_attention(tower)
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight *= PATCH_SCALE
    return AttributeReader(tower)


def train_tower(
    out: Path, *, steps: int, seed: int = 0, threads: int = 2, held_out: int = HELD_OUT, init: Path | None = None
) -> dict[str, dict[str, float]]:
    """Trains the tower on scenes from TOWER_START on and writes it into the folder `out`.

    Args:
        out: folder to create; written as `<out>.partial` and renamed when complete.
        steps: optimiser steps of 32 scenes each, 1 or more.
        seed: of the weights and of the first scene.
        threads: CPU threads of torch.
        held_out: how many validation scenes the accuracies are measured on.
        init: a tower to go on from, on whole pictures only; give another seed, so that the scenes are new ones.

    Returns:
        Percent right per readout ("features" is what the VLM reads) and attribute on validation scenes.

    Raises:
        FileExistsError: `out` is already there.
    """
    if out.exists():
        raise FileExistsError(f"{out} already holds a tower: remove it or choose another --out")
    torch.set_num_threads(threads)
    reader = build_reader(seed)
    facts: dict[str, object] = {"steps": steps, "seed": seed}
    if init is not None:
        reader.tower.load_state_dict(CLIPVisionModel.from_pretrained(init).state_dict())
        facts["init"] = json.loads((init / RECORD).read_text())
    started = time.monotonic()
    _optimise(reader, steps, seed, started, by_cell_steps=0 if init else round(BY_CELL_SHARE * steps))
    reader.tower.set_attn_implementation("whole")
    accuracies = held_out_accuracies(reader, held_out)
    seconds = round(time.monotonic() - started, 1)
    _write(reader.tower, out, {**facts, "seconds": seconds, "accuracies": accuracies})
    return accuracies


def _optimise(reader: AttributeReader, steps: int, seed: int, started: float, by_cell_steps: int) -> None:
    optimiser = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    first_seed = TOWER_START + seed * 10_000_000
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = learning_rate(step, steps)
        by_cell = step < by_cell_steps
        reader.tower.set_attn_implementation("by_cell" if by_cell else "whole")
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
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tower.save_pretrained(partial)
    train_tokenizer(partial)  # beside the tower, so that a model can be built from this folder alone
    record = {"command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]), **facts}
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    partial.rename(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--steps", type=int, default=1300, help="optimiser steps of 32 scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--init", type=Path, help="tower to go on from, on whole pictures (give another --seed)")
    arguments = parser.parse_args()
    accuracies = train_tower(**vars(arguments))
    print(json.dumps(accuracies, indent=2))


if __name__ == "__main__":
    main()
