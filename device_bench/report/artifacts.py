"""The artifacts of a run: size, proof of parity, and what each device measured."""

from pathlib import Path
from typing import Any

from device_bench.evaluate import load_answers
from device_bench.metrics import ENERGY, MEASURED, NAMES, PSS
from device_bench.report import wording
from device_bench.report.compare import changed_answers, checkpoint_answers, held_to_bar
from device_bench.report.selection import Selection
from device_bench.report.sources import Tree, read_config
from device_bench.tasks.base import Sample
from vlm.bars import is_four_bit

NO_MANIFEST = "the artifact's folder is not here, only its results"
EMULATED = "an emulated processor: its answers are right, its speed, memory and energy are no device's"
NOT_EXPORTED = "a checkpoint, not an export: there is nothing to prove"


def artifact_records(run: Path, called: str, selection: Selection) -> list[Tree]:
    """Every artifact of a run with its benches, by format, the wide precision first.

    Args:
        run: the run folder, or a plain bench folder (then only what the results say is known).
        called: its name in the report.
        selection: which of its artifacts and results.
    """
    manifests, results = selection.manifests, selection.results
    names = sorted({*manifests, *(result["artifact"]["name"] for _, result in results)}, key=_order)
    reference = checkpoint_answers(run / "student")
    allow_drift = bool((read_config(run).get("export") or {}).get("allow_drift"))
    records = []
    for name in names:
        own = [_bench(run, path, result, reference) for path, result in results if result["artifact"]["name"] == name]
        first: Tree = next((result["artifact"] for _, result in results if result["artifact"]["name"] == name), {})
        record = _artifact(name, manifests.get(name), first, own, allow_drift)
        records.append({**record, "run": called})
    return records


def _order(name: str) -> tuple[int, bool, str]:
    """By format in the order in which they are worded, the wide precision before the narrow one."""
    known, format_ = list(wording.FORMAT_NAMES), name.partition("-")[0]
    return known.index(format_) if format_ in known else len(known), is_four_bit(name), name


def _artifact(name: str, manifest: Tree | None, measured: Tree, benches: list[Tree], allow_drift: bool) -> Tree:
    source = manifest or measured
    size = sum(file["bytes"] for file in manifest["files"]) if manifest else measured.get("bytes")
    parity = _parity(manifest, benches, allow_drift)
    record: Tree = {
        "name": name,
        "format": source.get("format"),
        "precision": source.get("precision"),
        "precisions": manifest["precisions"] if manifest else None,
        "bytes": size,
        "parity": parity,
        "versions": manifest["versions"] if manifest else {},
        "notes": manifest["notes"] if manifest else [],
        "benches": benches,
    }
    absent = NOT_EXPORTED if source.get("format") == "torch" else NO_MANIFEST
    no_parity = "the export climbed no ladder" if manifest else absent
    why = {"bytes": NO_MANIFEST, "precisions": NO_MANIFEST, "parity": no_parity}
    return {**record, "reasons": {key: reason for key, reason in why.items() if record[key] is None}}


def _parity(manifest: Tree | None, benches: list[Tree], allow_drift: bool) -> Tree | None:
    """The manifest's ladder, with the rung of task accuracy taken from the bench where the export could not know it."""
    parity: Tree | None = manifest["parity"] if manifest else None
    if parity is None or any(rung["name"] == "accuracy" for rung in parity["rungs"]):
        return parity
    found = next((bench["difference"] for bench in benches if bench["difference"]), None)
    if found is None:
        return parity
    passed = found["state"] != "fail"
    rung = {
        "name": "accuracy",
        "metric": "points",
        "value": found["points"],
        "bar": found["bar"],
        "passed": passed,
        "reference": "float",
        "note": f"95 % interval {wording.points_interval(found['ci95'])}, {found['n']} paired answers",
    }
    allowed = parity.get("allowed_drift", False) or (allow_drift and not passed)
    rungs = [*parity["rungs"], rung]
    return {**parity, "rungs": rungs, "passed": parity["passed"] and passed, "allowed_drift": allowed}


def _bench(run: Path, path: Path, result: Tree, reference: list[Sample] | None) -> Tree:
    """One device's result, with the difference to the torch student and the answers that changed."""
    answers = path.parent / result["answers"] if result.get("answers") else None
    given = load_answers(answers) if answers and answers.is_file() and result["valid"] else None
    compared = _compare(reference, given, result["artifact"].get("precision") or "")
    reasons: dict[str, Any] = {**(result.get("reasons") or {}), **compared.pop("reasons")}
    if result["device"].get("kind") == "emulated":
        unsaid = (*NAMES, PSS.name, ENERGY.name, "thermal", "samples")
        result, reasons = {**result, **dict.fromkeys(unsaid)}, {**reasons, **dict.fromkeys(unsaid, EMULATED)}
    for key in MEASURED:
        if result.get(key) is None:
            reasons.setdefault(key, "the result file gives no reason")
    folder = path.parent.relative_to(run)
    return {
        **{key: value for key, value in result.items() if key not in ("schema", "artifact")},
        **{key: result.get(key) for key in MEASURED},
        **{key: (folder / result[key]).as_posix() if result.get(key) else None for key in ("samples", "answers")},
        **compared,
        "manifest_sha256": result["artifact"].get("manifest_sha256"),
        "reasons": reasons,
    }


def _compare(reference: list[Sample] | None, answers: list[Sample] | None, precision: str) -> Tree:
    """Difference to the torch student in points and the answers that changed, or the reason why there is none."""
    found: Tree = {"difference": None, "changed": None}
    if reference is None:
        why = "the torch student was not evaluated"
    elif answers is None:
        why = "no benchmark was answered, or the measurement is invalid"
    else:
        found["difference"], why = held_to_bar(reference, answers, precision)
        found["changed"] = changed_answers(reference, answers)
    return {**found, "reasons": {key: why for key, value in found.items() if value is None}}
