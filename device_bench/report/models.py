"""The models of a run: teacher, student and the same student without distillation, and what distillation was worth."""

from pathlib import Path

from device_bench.report.compare import checkpoint_answers, difference
from device_bench.report.sources import Tree, evaluation_folder, find_checkpoint, parameters, read_config, read_json


def teacher_folder(run: Path) -> Path | None:
    """Where the run's teacher lies, from `distill.teacher` of its configuration."""
    distill = read_config(run).get("distill")
    return find_checkpoint(distill.get("teacher"), run) if isinstance(distill, dict) else None


def model_records(run: Path) -> Tree:
    """Size and accuracy of teacher, student and undistilled student."""
    return {
        "teacher": _model(run, teacher_folder(run), "the run's config.yaml names no teacher that is on this machine"),
        "student": _model(run, run / "student", "the run has no student checkpoint"),
        "undistilled": _model(run, run / "undistilled", "the run trained no student without distillation"),
    }


def _model(run: Path, folder: Path | None, absent: str) -> Tree:
    if folder is None or not folder.is_dir():
        empty = dict.fromkeys(("params", "params_by_part", "accuracy"))
        return {**empty, "reasons": dict.fromkeys(empty, absent)}
    parts = parameters(folder)
    evaluation = read_json(evaluation_folder(folder) / "eval.json") or {}
    record: Tree = {
        "params": sum(parts.values()) if parts else None,
        "params_by_part": parts,
        "accuracy": evaluation.get("accuracy"),
        **_answers(run, folder),
    }
    why = {
        "params": "the checkpoint holds no safetensors file",
        "params_by_part": "the checkpoint holds no safetensors file",
        "accuracy": f"{folder.name}/eval.json is missing: the checkpoint was not evaluated",
    }
    return {**record, "reasons": {key: reason for key, reason in why.items() if record[key] is None}}


def _answers(run: Path, folder: Path) -> Tree:
    """Where the answers of a model of this run lie, so that the gate can compare them question by question."""
    path = evaluation_folder(folder) / "answers.jsonl"
    return {"answers": path.relative_to(run).as_posix()} if path.is_file() and path.is_relative_to(run) else {}


def distillation_worth(run: Path) -> Tree:
    """Paired difference between the student and the same student without distillation, in points.

    Returns:
        {difference: {points, ci95, p, n, tasks}, reasons}; one training seed, the interval is over the test images.
    """
    answers = {name: checkpoint_answers(run / name) for name in ("undistilled", "student")}
    before, after = answers["undistilled"], answers["student"]
    if before is None or after is None:
        missing = " and ".join(f"{name}/" for name, found in answers.items() if found is None)
        return {"difference": None, "reasons": {"difference": f"no evaluated answers in {missing}"}}
    worth, why = difference(before, after)
    return {"difference": worth, "reasons": {} if worth else {"difference": why}}
