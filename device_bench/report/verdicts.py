"""The verdicts of a run: what passed, what failed, and what cannot be judged."""

from typing import Literal

from device_bench.report.artifacts import within_bar
from device_bench.report.sources import Record
from device_bench.report.wording import artifact_name, points

State = Literal["pass", "fail", "unknown"]


def verdicts(report: Record) -> list[Record]:
    """Judge a report: [{name, state: pass | fail | unknown, text}], failures first, then what cannot be judged."""
    artifacts = report["artifacts"]
    found = [
        _parity(artifacts),
        _kept(artifacts),
        _distilled(report["distillation"]["difference"]),
        _chance(report["models"]["student"]["accuracy"]),
        _imports(artifacts),
        _valid(artifacts),
    ]
    order: list[State] = ["fail", "unknown", "pass"]
    return sorted(found, key=lambda verdict: order.index(verdict["state"]))


def _verdict(name: str, state: State, text: str) -> Record:
    return {"name": name, "state": state, "text": text}


def _parity(artifacts: list[Record]) -> Record:
    climbed = [artifact for artifact in artifacts if artifact["parity"]]
    failed = [artifact_name(artifact) for artifact in climbed if not artifact["parity"]["passed"]]
    if failed:
        return _verdict("parity", "fail", f"parity: under a bar in {', '.join(failed)}")
    if len(climbed) < len(artifacts) or not artifacts:
        return _verdict("parity", "unknown", f"parity: known of {len(climbed)} of {len(artifacts)} artifacts")
    return _verdict("parity", "pass", f"parity: {len(climbed)} of {len(artifacts)} artifacts are the trained model")


def _kept(artifacts: list[Record]) -> Record:
    found: dict[bool | None, list[str]] = {True: [], None: [], False: []}
    for artifact in artifacts:
        for bench in artifact["benches"]:
            if difference := bench["difference"]:
                name = f"{artifact_name(artifact)} {points(difference['points'])}"
                found[within_bar(difference, artifact["precision"] or "")].append(name)
    if found[False]:
        return _verdict("accuracy", "fail", f"accuracy: lost too much in {', '.join(found[False])}")
    if found[None]:
        return _verdict("accuracy", "unknown", f"accuracy: too few questions to clear {', '.join(found[None])}")
    judged = sum(any(bench["difference"] for bench in artifact["benches"]) for artifact in artifacts)
    if judged < len(artifacts) or not artifacts:
        return _verdict("accuracy", "unknown", f"accuracy: compared for {judged} of {len(artifacts)} artifacts")
    return _verdict("accuracy", "pass", "accuracy: every artifact within its bar of the torch student")


def _distilled(difference: Record | None) -> Record:
    if difference is None:
        return _verdict("distillation", "unknown", "distillation: no undistilled student to compare with")
    low, high = difference["ci95"]
    text = f"distillation: {points(difference['points'])} points [{points(low)}, {points(high)}]"
    return _verdict("distillation", "pass" if low > 0 else "fail" if high < 0 else "unknown", text)


def _chance(accuracy: Record | None) -> Record:
    if not accuracy:
        return _verdict("chance", "unknown", "families: the student was not evaluated")
    known = {name: task for name, task in accuracy["tasks"].items() if task.get("chance") is not None}
    below = [name for name, task in known.items() if task["score"] <= task["chance"]]
    if below:
        return _verdict("chance", "fail", f"families: student not above chance in {', '.join(below)}")
    if len(known) < len(accuracy["tasks"]):
        return _verdict("chance", "unknown", f"families: chance known for {len(known)} of {len(accuracy['tasks'])}")
    return _verdict("chance", "pass", f"families: student above chance in all {len(known)}")


def _imports(artifacts: list[Record]) -> Record:
    imported = [
        (artifact_name(artifact), bench.get("imported")) for artifact in artifacts for bench in artifact["benches"]
    ]
    guilty = sorted({name for name, libraries in imported if libraries and any(libraries.values())})
    if guilty:
        return _verdict("imports", "fail", f"imports: training libraries loaded by {', '.join(guilty)}")
    if not imported or any(libraries is None for _, libraries in imported):
        return _verdict("imports", "unknown", "imports: not recorded for every artifact")
    return _verdict("imports", "pass", "imports: no artifact's process loaded torch or transformers")


def _valid(artifacts: list[Record]) -> Record:
    benches = [(artifact_name(artifact), bench) for artifact in artifacts for bench in artifact["benches"]]
    invalid = [name for name, bench in benches if not bench.get("valid", False)]
    if invalid:
        return _verdict("measurements", "fail", f"measurements: invalid for {', '.join(invalid)}")
    if not all(artifact["benches"] for artifact in artifacts) or not benches:
        missing = [artifact_name(artifact) for artifact in artifacts if not artifact["benches"]]
        return _verdict("measurements", "unknown", f"measurements: none of {', '.join(missing) or 'any artifact'}")
    return _verdict("measurements", "pass", f"measurements: all {len(benches)} valid")
