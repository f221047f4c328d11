"""The last rung of the parity ladder: each artifact's benchmark accuracy against the torch student's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm.bars import accuracy_bar
from vlm.folders import write_atomic


def write(run_dir: Path, out: Path, allow_drift: bool) -> Path:
    """Compare every result of a run's own artifacts with the student and write the verdicts.

    An artifact fails when it lost more points than its bar (1.0; 3.0 for 4-bit weights) and the paired 95 % interval
    excludes the bar, so that chance alone does not fail it.

    Args:
        run_dir: the run folder with evaluations/ and results/.
        out: the file to write: per artifact the points lost or won with their interval, the bar and the verdict; and
            what was left out because it is not of this student and configuration.
        allow_drift: what fails is recorded, but is no problem.
    Raises:
        UserError: an answers file is broken.
    """
    from device_bench.report.selection import select

    selection, compared = select(run_dir), {}
    for path, result in selection.results:
        compared[f"{path.parent.name}/{result['artifact']['name']}"] = _compare(run_dir / "student", path, result)
    tree = {"schema": 1, "reference": "student", "allowed_drift": allow_drift, "artifacts": compared}
    tree["left_out"] = selection.left_out
    write_atomic(out, json.dumps(tree, indent=1) + "\n")
    return out


def problems(path: Path) -> list[str]:
    """Say which artifacts of a verdict file lost too much; empty when none did or drift is allowed."""
    if not path.is_file():
        return []
    tree = json.loads(path.read_text())
    if tree["allowed_drift"]:
        return []
    return [_problem(name, entry) for name, entry in tree["artifacts"].items() if entry["passed"] is False]


def _problem(name: str, entry: dict[str, Any]) -> str:
    low, high = entry["ci95"]
    return (
        f"{name}: {entry['points']:+.1f} points of accuracy against the torch student (95 % interval {low:+.1f} to "
        f"{high:+.1f}), at least {entry['bar']:+.1f} expected. Export a wider precision, or allow it: "
        "export.allow_drift=true."
    )


def _compare(student: Path, path: Path, result: dict[str, Any]) -> dict[str, Any]:
    from device_bench.evaluate import load_answers
    from device_bench.report.compare import checkpoint_answers, held_to_bar

    precision = result["artifact"]["precision"]
    unknown = {"points": None, "ci95": None, "bar": accuracy_bar(precision), "passed": None}
    if not result["valid"]:
        return {**unknown, "reason": f"the measurement is invalid: {result['invalid_because']}"}
    if not result["answers"]:
        return {**unknown, "reason": result["reasons"].get("accuracy", "no answers were recorded")}
    reference = checkpoint_answers(student)
    if reference is None:
        return {**unknown, "reason": "the student was not evaluated"}
    found, why = held_to_bar(reference, load_answers(path.parent / result["answers"]), precision)
    if found is None:
        return {**unknown, "reason": why}
    return {key: found[key] for key in ("points", "ci95", "bar")} | {"passed": found["state"] != "fail", "reason": None}
