"""The end of `make teacher`: put the teacher where the built-in default finds it, and say how it was made."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from device_bench.config import BenchConfig
from pocketvlm.console import exit_codes
from pocketvlm.evaluation import evaluate_checkpoint
from vlm.folders import finished_folder
from vlm.machine import processor

SHIPPED = Path("checkpoints/tiny-teacher")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def ship(teacher: Path, tower: Path, out: Path, bench: BenchConfig) -> Path:
    """Evaluate a teacher on the test scenes and write its checkpoint, scores and README.md to `out`.

    Args:
        teacher: folder of the trained teacher, with history.json.
        tower: folder of its vision tower, with tower.json.
        out: the folder to make.
        bench: which questions.
    """
    evaluation = evaluate_checkpoint(teacher, teacher.parent / "evaluation", bench)
    accuracy = json.loads((evaluation / "eval.json").read_text())["accuracy"]
    history = json.loads((teacher / "history.json").read_text())
    record = json.loads((tower / "tower.json").read_text())
    with finished_folder(out) as folder:
        for name in FILES:
            shutil.copy2(teacher / name, folder / name)
        (folder / "eval.json").write_text(json.dumps({"accuracy": accuracy, "answers": None}, indent=1) + "\n")
        (folder / "README.md").write_text(readme(accuracy, history, record, bench.scenes))
    return out


def readme(accuracy: dict[str, Any], history: dict[str, Any], tower: dict[str, Any], scenes: int) -> str:
    """Say which commands, seeds and times made the teacher, and how well it answers."""
    runs = [tower]
    while "init" in runs[0]:
        runs.insert(0, runs[0]["init"])
    lines = [
        "# The built-in default's teacher",
        "",
        "A MobileVLM V2 of 256 x 4, trained from random weights on the built-in scenes; the student has its tower.",
        "Made by `make teacher`:",
        "",
        *(f"* vision tower: `{run['command']}`, seed {run['seed']}, {run['seconds']:.0f} s" for run in runs),
        f"* teacher: `pocketvlm distill configs/teacher.yaml`, seed {history['seed']}, {history['steps']} steps, "
        f"{history['seconds']:.0f} s",
        f"* processor: {processor()}",
        "",
        f"Tower, percent of attributes right on validation scenes: {_pairs(tower['accuracies']['features'])}.",
        "",
        f"Teacher on {scenes} test scenes ({accuracy['avg']['n']} questions), percent with 95 % interval:",
        "",
        "| benchmark | score | 95 % interval | chance |",
        "|---|---|---|---|",
    ]
    for name, entry in {**accuracy["tasks"], "average": accuracy["avg"]}.items():
        low, high = entry["ci95"]
        chance = f"{entry['chance']:.1f}" if "chance" in entry else ""
        lines.append(f"| {name} | {entry['score']:.1f} | {low:.1f} to {high:.1f} | {chance} |")
    return "\n".join(lines) + "\n"


def _pairs(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("runs/teacher/student"))
    parser.add_argument("--tower", type=Path, default=Path("runs/tower"))
    parser.add_argument("--out", type=Path, default=SHIPPED)
    arguments = parser.parse_args()
    with exit_codes():
        print(ship(arguments.teacher, arguments.tower, arguments.out, BenchConfig()))


if __name__ == "__main__":
    main()
