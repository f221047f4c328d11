"""Accuracy of a checkpoint in torch: the reference that every artifact is held against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.folders import finished_folder

if TYPE_CHECKING:
    from device_bench.config import BenchConfig
    from device_bench.tasks.base import BenchQuestion


def evaluate_checkpoint(
    checkpoint: Path,
    out: Path,
    config: BenchConfig,
    on_progress: Callable[[float, str], None] | None = None,
    split: str = "test",
) -> Path:
    """Ask a checkpoint the benchmark's questions and write `out`/eval.json and `out`/answers.jsonl.

    Args:
        checkpoint: folder in Hugging Face layout.
        out: folder that shall exist only when it is complete.
        config: which questions, and how many tokens an answer may have.
        on_progress: told the share of questions answered.
        split: "test", or "validation" for choosing (built-in scenes only).
    Raises:
        UserError: the checkpoint cannot be loaded, or a benchmark has no validation split.
    """
    from device_bench.evaluate import evaluate, publish, save_answers, score
    from device_bench.subset import chosen
    from vlm.runtimes import open_runtime

    runtime = open_runtime(checkpoint, config.threads)
    if split == "test":
        asked, editions = chosen(config.tasks, config.scenes, config.data, config.limit)
    else:
        asked, editions = validation_questions(config), {}

    def say(done: int, total: int) -> None:
        if on_progress:
            on_progress(done / total, f"{checkpoint.name}: question {done}/{total}")

    samples = evaluate(runtime, asked, config.max_new_tokens, say)
    with finished_folder(out) as folder:
        save_answers(samples, folder / "answers.jsonl")
        tree = {"accuracy": publish(score(samples), editions), "answers": "answers.jsonl", "scenes": config.scenes}
        (folder / "eval.json").write_text(json.dumps(tree, indent=1) + "\n")
    return out


def validation_questions(config: BenchConfig) -> list[BenchQuestion]:
    """Questions about scenes that are neither trained on nor tested.

    Raises:
        UserError: another benchmark than the built-in one is among the tasks.
    """
    from device_bench.tasks import scenes
    from vlm.data.scenes.scene import VALIDATION_START
    from vlm.errors import UserError

    if config.tasks != ["scenes"]:
        raise UserError(
            f"bench.tasks: {', '.join(config.tasks)} found; only the built-in scenes have a validation split. "
            "Choose with tasks [scenes], or split: test."
        )
    return scenes.questions(config.scenes, VALIDATION_START)
