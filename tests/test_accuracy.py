"""The accuracy rung: what an artifact may lose against the torch student, and what chance may explain."""

import json
from pathlib import Path
from typing import Any

import pytest

from device_bench.evaluate import grade, save_answers
from device_bench.tasks.scenes import questions
from pocketvlm import accuracy

QUESTIONS = questions(40)


def answers(path: Path, wrong_every: int) -> Path:
    """Answer every question rightly but each `wrong_every`-th (0: none)."""
    samples = []
    for number, question in enumerate(QUESTIONS):
        truth = question.truth if isinstance(question.truth, str) else question.truth[0]
        wrong = wrong_every and number % wrong_every == 0
        samples.append(grade(question, "none of these" if wrong else truth))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_answers(samples, path)
    return path


def verdict(
    run_dir: Path, precision: str, wrong_every: int, allow_drift: bool = False, **result: Any
) -> dict[str, Any]:
    """Judge one artifact whose answers are wrong now and then, against a student that knows everything."""
    student = answers(run_dir / "evaluations" / "student" / "answers.jsonl", 0)
    student.with_name("eval.json").write_text(json.dumps({"accuracy": {}, "answers": student.name}))
    name = f"onnx-{precision}"
    given = answers(run_dir / "results" / "local" / f"{name}.answers.jsonl", wrong_every)
    about = {"name": name, "precision": precision}
    tree = {"artifact": about, "device": {}, "valid": True, "answers": given.name, "reasons": {}, **result}
    (given.parent / f"{name}.json").write_text(json.dumps(tree))
    path = accuracy.write(run_dir, run_dir / "accuracy.json", allow_drift)
    entry = json.loads(path.read_text())["artifacts"][f"local/{name}"]
    assert isinstance(entry, dict)
    return {**entry, "problems": accuracy.problems(path)}


@pytest.mark.parametrize(("precision", "wrong_every"), [("fp32", 5), ("int4", 5)])
def test_a_real_loss_fails_and_is_named(tmp_path: Path, precision: str, wrong_every: int) -> None:
    found = verdict(tmp_path, precision, wrong_every)
    assert found["passed"] is False and found["points"] < -10
    assert len(found["problems"]) == 1 and f"local/onnx-{precision}" in found["problems"][0]


def test_a_loss_that_chance_explains_passes(tmp_path: Path) -> None:
    found = verdict(tmp_path, "fp32", 100)
    assert found["points"] < found["bar"] < found["ci95"][1]
    assert found["passed"] is True and found["problems"] == []


def test_four_bits_may_lose_more(tmp_path: Path) -> None:
    assert verdict(tmp_path, "8da4w", 0)["bar"] < verdict(tmp_path, "fp16", 0)["bar"]


def test_allowed_drift_is_recorded_but_no_problem(tmp_path: Path) -> None:
    found = verdict(tmp_path, "fp32", 5, allow_drift=True)
    assert found["passed"] is False and found["problems"] == []


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"answers": None, "reasons": {"accuracy": "needs macOS"}}, "needs macOS"),
        ({"valid": False, "invalid_because": "it crashed"}, "it crashed"),
    ],
)
def test_what_was_not_measured_is_null_with_its_reason(tmp_path: Path, result: dict[str, Any], reason: str) -> None:
    found = verdict(tmp_path, "fp32", 0, **result)
    assert found["passed"] is None and found["points"] is None and reason in found["reason"]
