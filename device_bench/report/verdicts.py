"""The verdicts of a run: what passed, what failed, and what cannot be judged."""

from typing import Literal

from device_bench.report.sources import Tree
from device_bench.report.wording import display_name, points
from device_bench.worker import FORBIDDEN

State = Literal["pass", "fail", "unknown"]


def verdicts(report: Tree) -> list[Tree]:
    """Judge a report: [{name, state: pass | fail | unknown, text}], failures first, then what cannot be judged."""
    artifacts = report["artifacts"]
    found = [
        _parity(artifacts),
        _accuracy(artifacts),
        _distillation(report["distillation"]["difference"]),
        _families(report["models"]["student"]["accuracy"]),
        _imports(artifacts),
        _measurements(artifacts),
        *([_gate(report["gate"])] if report["gate"] else []),
    ]
    order: list[State] = ["fail", "unknown", "pass"]
    return sorted(found, key=lambda verdict: order.index(verdict["state"]))


def _verdict(name: str, state: State, text: str) -> Tree:
    return {"name": name, "state": state, "text": text}


def _parity(artifacts: list[Tree]) -> Tree:
    climbed = [artifact for artifact in artifacts if artifact["parity"]]
    failed = [display_name(artifact) for artifact in climbed if not artifact["parity"]["passed"]]
    if failed:
        return _verdict("parity", "fail", f"parity: under a bar in {', '.join(failed)}")
    if len(climbed) < len(artifacts) or not artifacts:
        return _verdict("parity", "unknown", f"parity: known of {len(climbed)} of {len(artifacts)} artifacts")
    return _verdict("parity", "pass", f"parity: {len(climbed)} of {len(artifacts)} artifacts are the trained model")


def _accuracy(artifacts: list[Tree]) -> Tree:
    found: dict[State, list[str]] = {"pass": [], "unknown": [], "fail": []}
    for artifact in artifacts:
        for bench in artifact["benches"]:
            if difference := bench["difference"]:
                name = f"{display_name(artifact)} {points(difference['points'])}"
                found[difference["state"]].append(name)
    if found["fail"]:
        return _verdict("accuracy", "fail", f"accuracy: lost too much in {', '.join(found['fail'])}")
    if found["unknown"]:
        return _verdict("accuracy", "unknown", f"accuracy: too few questions to clear {', '.join(found['unknown'])}")
    judged = sum(any(bench["difference"] for bench in artifact["benches"]) for artifact in artifacts)
    if judged < len(artifacts) or not artifacts:
        return _verdict("accuracy", "unknown", f"accuracy: compared for {judged} of {len(artifacts)} artifacts")
    return _verdict("accuracy", "pass", "accuracy: every artifact within its bar of the torch student")


def _distillation(difference: Tree | None) -> Tree:
    if difference is None:
        return _verdict("distillation", "unknown", "distillation: no undistilled student to compare with")
    low, high = difference["ci95"]
    text = f"distillation: {points(difference['points'])} points [{points(low)}, {points(high)}]"
    return _verdict("distillation", "pass" if low > 0 else "fail" if high < 0 else "unknown", text)


def _families(accuracy: Tree | None) -> Tree:
    if not accuracy:
        return _verdict("chance", "unknown", "families: the student was not evaluated")
    known = {name: task for name, task in accuracy["tasks"].items() if task.get("chance") is not None}
    below = [name for name, task in known.items() if task["score"] <= task["chance"]]
    if below:
        return _verdict("chance", "fail", f"families: student not above chance in {', '.join(below)}")
    if len(known) < len(accuracy["tasks"]):
        return _verdict("chance", "unknown", f"families: chance known for {len(known)} of {len(accuracy['tasks'])}")
    return _verdict("chance", "pass", f"families: student above chance in all {len(known)}")


def _imports(artifacts: list[Tree]) -> Tree:
    imported = [
        (display_name(artifact), bench.get("imported"))
        for artifact in artifacts
        for bench in artifact["benches"]
        if bench.get("engine") != "torch"  # a checkpoint, which needs them
    ]
    guilty = sorted({name for name, libraries in imported if any((libraries or {}).get(n) for n in FORBIDDEN)})
    if guilty:
        return _verdict("imports", "fail", f"imports: training libraries loaded by {', '.join(guilty)}")
    if not imported or any(libraries is None for _, libraries in imported):
        return _verdict("imports", "unknown", "imports: not recorded for every artifact")
    return _verdict("imports", "pass", "imports: no artifact's process loaded a training library")


def _gate(gate: Tree) -> Tree:
    states: dict[str, State] = {"pass": "pass", "regression": "fail"}
    reasons = f": {'; '.join(gate['reasons'])}" if gate["reasons"] else ""
    return _verdict("gate", states.get(gate["verdict"], "unknown"), f"gate: {gate['verdict']}{reasons}")


def _measurements(artifacts: list[Tree]) -> Tree:
    benches = [(display_name(artifact), bench) for artifact in artifacts for bench in artifact["benches"]]
    invalid = [name for name, bench in benches if not bench.get("valid", False)]
    if invalid:
        return _verdict("measurements", "fail", f"measurements: invalid for {', '.join(invalid)}")
    if not all(artifact["benches"] for artifact in artifacts) or not benches:
        missing = [display_name(artifact) for artifact in artifacts if not artifact["benches"]]
        return _verdict("measurements", "unknown", f"measurements: none of {', '.join(missing) or 'any artifact'}")
    return _verdict("measurements", "pass", f"measurements: all {len(benches)} valid")
