"""What a run will need of memory, disk and time, from estimated factors; a forecast, and said to be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_bench.report.sources import parameters
from pocketvlm.ledger import Ledger
from pocketvlm.progress import span
from pocketvlm.steps import road

if TYPE_CHECKING:
    from distill.config import DistillConfig, Student
    from pocketvlm.pipeline import RunConfig

MIB = 2**20
# The built-in default: two students trained side by side with torch and transformers, 1.9 GB each, and the run itself.
BASE_MEMORY = 4500 * MIB
# Per parameter of the student. Training: weights, gradients and two moments in float32. Exporting: the worst format
# (Core ML int4) took 10.5 GB for 1.36e9 parameters. Disk: wide and narrow artifacts of four formats, and checkpoints.
TRAINING_BYTES, EXPORT_BYTES, DISK_BYTES = 16, 8, 24
BASE_DISK = 200 * MIB
# Step times are known for models of about this size, or from an earlier run of the same configuration.
SMALL_MODEL = 20e6


def needed_memory(config: RunConfig) -> int | None:
    """Peak resident memory in bytes; None when the student's size is unknown."""
    student, teacher = student_parameters(config.distill), teacher_parameters(config.distill)
    if student is None or teacher is None:
        return None
    return int(BASE_MEMORY + max(TRAINING_BYTES * student + 4 * teacher, EXPORT_BYTES * student))


def needed_disk(config: RunConfig) -> int | None:
    """Bytes that the run folder will grow to; None when the student's size is unknown."""
    student = student_parameters(config.distill)
    return None if student is None else int(BASE_DISK + DISK_BYTES * student)


def needed_time(config: RunConfig, run_dir: Path) -> str:
    """The time that what is still to be done will take, in words."""
    ledger = Ledger(run_dir)
    steps = road(config, run_dir)
    pending = ledger.pending(steps)
    todo = [step for step in steps if any(product.name in pending for product in step.products)]
    if not todo:
        return "nothing to do"
    measured = all(any((stamp := ledger.stamp(p.name)) and stamp.seconds for p in step.products) for step in todo)
    if not measured and (student_parameters(config.distill) or 0) > SMALL_MODEL:
        return "unknown for a model of this size until it ran once here"
    return f"about {span(sum(map(ledger.expected_s, todo)))} on two cores, {len(todo)} of {len(steps)} steps"


def teacher_parameters(config: DistillConfig) -> int | None:
    """Parameters of the teacher, 0 without one."""
    return 0 if config.teacher is None else _count(Path(config.teacher))


def student_parameters(config: DistillConfig) -> int | None:
    """Parameters of the student without counting the projector, from its checkpoint or its sizes."""
    if isinstance(config.student, str):
        return _count(Path(config.student))
    source = config.vision or config.teacher
    tree = _config(Path(source)) if source else {}
    vocabulary = tree.get("text_config", tree).get("vocab_size", 0)
    tower = (parameters(Path(source)) or {}).get("vision", 0) if source else 0
    return decoder_parameters(config.student, vocabulary) + tower


def decoder_parameters(student: Student, vocabulary: int) -> int:
    """Parameters of a LLaMA decoder with its own output matrix: attention, gated MLP, embeddings, no norms."""
    width, heads = student.hidden_size, student.num_attention_heads
    kv_width = width // heads * student.num_key_value_heads
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * student.intermediate_size
    return student.num_hidden_layers * layer + 2 * vocabulary * width


def _count(folder: Path) -> int | None:
    counts = parameters(folder)
    return None if counts is None else sum(counts.values())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    tree = json.loads(path.read_text()) if path.is_file() else {}
    return tree if isinstance(tree, dict) else {}
