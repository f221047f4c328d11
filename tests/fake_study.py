"""Cells whose students cost nothing: `python -m tests.fake_study FOLDER TASK` stands in for pocketvlm.study.job.

A student knows an answer for every four steps; `KILL=<folder>/<task>` ends the process in
the middle, `FAIL=<row>` makes a training fail. Every task done is noted in the file CALLS.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

from distill.config import DistillConfig
from pocketvlm import steps
from pocketvlm.study import job, pool
from pocketvlm.study.cells import Cell
from vlm.errors import UserError
from vlm.folders import finished_folder

SECONDS = {"slow": 40.0}  # of a training, by row; 10 for the others
PROCESSOR_SHARE = {"slow": 0.5}  # of these seconds; 1 for the others


def distill(config: DistillConfig, run_dir: Path, on_progress: object) -> Path:
    """Leave a history."""
    row = run_dir.parent.name
    if row == os.environ.get("FAIL"):
        raise UserError(f"{row} collapsed")
    with finished_folder(run_dir / "student", resume=True) as folder:
        (folder / "begun").open("a").write("x")
        note(run_dir, "train")
        terms = {"sup": {"value": 4.0 + config.seed, "grad_norm": 1.0, "weight": 1.0}}
        rows = [{"step": step, "stage": "s", "loss": 4.0, "lr": 1.0, "terms": terms} for step in (0, 1, 2)]
        total = sum(stage.steps for stage in config.stages)
        seconds = SECONDS.get(row, 10.0) * total / 100
        times = {"seconds": seconds, "processor_seconds": PROCESSOR_SHARE.get(row, 1.0) * seconds}
        tree = {"seed": config.seed, **times, "steps": total, "rows": rows, "reports": []}
        (folder / "history.json").write_text(json.dumps(tree))
        (folder / "known").write_text(str(round(total * config.stages[0].learning_rate / 4) + config.seed))
    return run_dir / "student"


def evaluate(checkpoint: Path, out: Path, config: object, on_progress: object, split: str) -> Path:
    """Answer the first `known` questions of nine scenes rightly."""
    from device_bench.evaluate import grade, save_answers, score
    from device_bench.tasks.scenes import questions

    note(checkpoint.parent, split)
    known = int((checkpoint / "known").read_text())
    asked = questions(9, 900_000 if split == "validation" else 950_000)
    truths = [question.truth if isinstance(question.truth, str) else question.truth[0] for question in asked]
    answers = [truth if index < known else "nonsense" for index, truth in enumerate(truths)]
    samples = [grade(question, answer) for question, answer in zip(asked, answers, strict=True)]
    with finished_folder(out) as folder:
        save_answers(samples, folder / "answers.jsonl")
        (folder / "eval.json").write_text(json.dumps({"accuracy": score(samples)}))
    return out


def note(folder: Path, task: str) -> None:
    """Record the task, and end the process if the environment says so."""
    name = f"{folder.parent.parent.name}/{folder.parent.name}/{folder.name} {task}"
    with Path(os.environ["CALLS"]).open("a") as file:
        file.write(name + "\n")
    if os.environ.get("KILL") == name:
        os._exit(9)


MODULES = {"distill.run": {"run": distill}, "pocketvlm.evaluation": {"evaluate_checkpoint": evaluate}}


def module(name: str) -> ModuleType:
    """A fake stage, to stand in sys.modules where the steps import the real one."""
    fake = ModuleType(name)
    vars(fake).update(MODULES[name])
    return fake


def run(jobs: list[pool.Job], parallel: int, threads: int, quiet: bool) -> dict[Cell, str]:
    """pool.run without processes."""
    failures = {}
    for waiting in jobs:
        try:
            job.work(waiting.cell.folder, waiting.task)
        except UserError as error:
            failures[waiting.cell] = str(error)
    return failures


if __name__ == "__main__":
    sys.modules.update({name: module(name) for name in MODULES})
    steps.code_version = " ".join
    sys.exit(job.main())
