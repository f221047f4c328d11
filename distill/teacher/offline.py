"""From a live teacher to its cache, before the training begins."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from distill.build import computing_device, computing_dtype
from distill.config import DistillConfig, Stage
from distill.data.rows import Rows
from distill.features import tower_probe
from distill.model import AlignKD
from distill.pair import facts_of
from distill.teacher.cache_writer import CacheWriter
from distill.teacher.live import Teacher
from distill.training.processes import Processes


def offline(
    config: DistillConfig,
    module: AlignKD,
    tokenizer_folder: Path,
    data: list[tuple[Stage, Rows]],
    max_length: int,
    who: Processes,
) -> None:
    """Write the teacher's cache if the run wants one that is not there, and let go of the teacher."""
    if config.cache is None or not isinstance(module.teacher, Teacher):
        return
    device = computing_device()
    if config.teacher_bits is None:
        module.teacher.model.to(device)
    facts = facts_of(module.teacher.model, AutoTokenizer.from_pretrained(tokenizer_folder))
    image_token_id: int = module.student.config.image_token_id
    writer = CacheWriter(config, module.teacher, module.tower, image_token_id, max_length)

    def say(done: int, count: int) -> None:
        if who.first:
            line = {"stage": "teacher's outputs", "step": done, "steps": count, "prepared": True}
            print(json.dumps(line), flush=True)

    probe = tower_probe(module.student)
    with module.tower.computing(device, computing_dtype(config)):
        module.teacher = writer.write(facts, probe, data, who, say)
    del writer
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
