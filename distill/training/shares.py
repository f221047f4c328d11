"""How much of a step's means each of its batches is.

Each term is a mean: over answer tokens, rows of attention, images. The mean of several batches' means is not the mean
of all, since batches differ in how many of these they have. A batch's term times its share is: a step has then the same
loss however its records are divided over processes and accumulation.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from distill.model import SUPERVISED, AlignKD
from distill.probe import find_positions
from distill.spoken import compared
from vlm.data.collator import IGNORE


def shares(module: AlignKD, batches: list[dict[str, Any]], arguments: TrainingArguments) -> list[dict[str, float]]:
    """For each of this process's batches of a step, the factor on each term.

    Args:
        module: what is trained.
        batches: of one step.
        arguments: the Trainer's, which know the processes.
    """
    counted = [counts(module, batch) for batch in batches]
    names = list(counted[0])
    own = torch.tensor([[count[name] for name in names] for count in counted], dtype=torch.float64)  # [G, T]
    total = own.sum(0).float().to(arguments.device)  # [T]
    if arguments.world_size > 1:
        torch.distributed.all_reduce(total)
    parts = arguments.world_size * len(batches)
    factors = own * parts / total.cpu().clamp(min=1)  # [G, T]
    return [dict(zip(names, row.tolist(), strict=True)) for row in factors]


def counts(module: AlignKD, batch: dict[str, Any]) -> dict[str, int]:
    """What each term's mean is over, in one batch."""
    recipe, image = module.recipe, int(module.student.config.image_token_id)
    found = {SUPERVISED: int((batch["labels"] != IGNORE).sum())}
    if recipe.attention:
        visible: Tensor | None = batch.get("attention_mask")
        block = recipe.attention.block
        found["attention"] = int(
            find_positions(batch["input_ids"], batch["segments"], visible, image, block).row_mask.sum()
        )
    if recipe.vision_tokens:
        found["vision"] = len(batch["images"])
    places = compared(recipe, batch["input_ids"], batch["labels"], batch["segments"], image)
    return found | {name: int(place.sum()) for name, place in places.items()}
