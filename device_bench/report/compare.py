"""Answers to the same questions compared: paired difference in points, and which answers changed."""

from collections.abc import Sequence
from pathlib import Path

from device_bench.evaluate import load_answers
from device_bench.report.sources import Tree, evaluation_folder, read_json
from device_bench.stats import paired_difference
from device_bench.tasks.base import Sample
from vlm.bars import accuracy_bar, accuracy_verdict
from vlm.errors import UserError

MOST_SHOWN = 12
NOTHING_IN_COMMON = "the two answered no question in common"
# Shown first: what the export broke, then what it mended, then other words of the same worth.
_ORDER = ("lost", "gained", "other")


def checkpoint_answers(checkpoint: Path) -> list[Sample] | None:
    """The answers that a checkpoint's eval.json points to, None where it was not evaluated."""
    folder = evaluation_folder(checkpoint)
    evaluation = read_json(folder / "eval.json")
    path = folder / evaluation.get("answers", "answers.jsonl") if evaluation else None
    return load_answers(path) if path and path.is_file() else None


def difference(before: Sequence[Sample], after: Sequence[Sample]) -> tuple[Tree | None, str]:
    """Paired difference after - before in points, over the questions that both answered.

    Returns:
        {points, ci95, p, test, n, tasks: {family: {...}}} and "", or None and why the two cannot be compared.
    """
    common = {_key(sample) for sample in before} & {_key(sample) for sample in after}
    if not common:
        return None, NOTHING_IN_COMMON
    shared = [[sample for sample in samples if _key(sample) in common] for samples in (before, after)]
    try:
        found = paired_difference(*shared)
    except UserError as error:
        return None, str(error)
    return {**found["avg"], "tasks": {family: value for family, value in found.items() if family != "avg"}}, ""


def held_to_bar(student: Sequence[Sample], artifact: Sequence[Sample], precision: str) -> tuple[Tree | None, str]:
    """The last rung of the parity ladder: `difference`, with the `bar` of a precision and the `state` that it gives."""
    found, why = difference(student, artifact)
    if found is None:
        return None, why
    state = accuracy_verdict(found["points"], found["ci95"], precision)
    return {**found, "bar": accuracy_bar(precision), "state": state}, ""


def changed_answers(before: Sequence[Sample], after: Sequence[Sample]) -> Tree | None:
    """What an artifact answers otherwise than the torch student.

    Args:
        before: the torch student's answers.
        after: the artifact's.
    Returns:
        {compared, changed, lost, gained, other, shown}, or None where no question is common. An answer is lost when it
        earned more credit before; `shown` has at most MOST_SHOWN of {id, image, family, prompt, truth, verdict, before,
        after}.
    """
    known = {_key(sample): sample for sample in before}
    pairs = [(known[_key(sample)], sample) for sample in after if _key(sample) in known]
    if not pairs:
        return None
    changes = [_change(old, new) for old, new in pairs if old.answer.strip() != new.answer.strip()]
    counts = {verdict: sum(change["verdict"] == verdict for change in changes) for verdict in _ORDER}
    shown = sorted(changes, key=lambda change: (_ORDER.index(change["verdict"]), change["family"], change["id"]))
    return {"compared": len(pairs), "changed": len(changes), **counts, "shown": _mixed(shown)[:MOST_SHOWN]}


def beside_host(artifacts: Sequence[Tree], roots: dict[str, Path]) -> None:
    """Put into every device's bench, as "host", what this machine answered with the same artifact.

    Args:
        artifacts: records of the report; those of other machines than hosts get {accuracy, answers: as
            `changed_answers`, from the host's to the device's}, or None and the reason.
        roots: folder of each run by its name in the report.
    """

    def samples(artifact: Tree, bench: Tree) -> list[Sample]:
        return load_answers(roots[artifact["run"]] / bench["answers"])

    benches = [(artifact, bench) for artifact in artifacts for bench in artifact["benches"]]
    usable = [(artifact, bench) for artifact, bench in benches if bench["valid"] and bench["accuracy"]]
    hosts = {bench["manifest_sha256"]: (artifact, bench) for artifact, bench in usable if _is_host(bench)}
    for artifact, bench in benches:
        host = hosts.get(bench["manifest_sha256"])
        bench["host"] = None
        if _is_host(bench):
            bench["reasons"]["host"] = "this is the host"
        elif host is None or not bench["valid"] or not bench["answers"]:
            bench["reasons"]["host"] = "there are no answers of the device and of a host with this artifact"
        else:
            answers = changed_answers(samples(*host), samples(artifact, bench))
            bench["host"] = {"accuracy": host[1]["accuracy"]["avg"], "answers": answers}


def _is_host(bench: Tree) -> bool:
    return bool(bench["device"].get("kind") == "host")


def _key(sample: Sample) -> tuple[str, str]:
    return sample.family, sample.id


def _change(old: Sample, new: Sample) -> Tree:
    return {
        "id": new.id,
        "image": new.image,
        "family": new.family,
        "prompt": new.prompt,
        "truth": new.truth,
        "verdict": "lost" if new.correct < old.correct else "gained" if new.correct > old.correct else "other",
        "before": {"answer": old.answer, "credit": old.correct},
        "after": {"answer": new.answer, "credit": new.correct},
    }


def _mixed(changes: Sequence[Tree]) -> list[Tree]:
    """Within each verdict take the families in turn, so that one of them cannot fill the page."""
    turns: dict[tuple[str, str], int] = {}
    ranked = []
    for change in changes:
        key = change["verdict"], change["family"]
        turns[key] = turns.get(key, 0) + 1
        ranked.append((_ORDER.index(change["verdict"]), turns[key], change))
    return [change for _, _, change in sorted(ranked, key=lambda entry: entry[:2])]
