"""The gate: is the new report no worse than the baseline? Pass, regression or cannot judge: exit code 0, 1 or 2.

A regression anywhere is the verdict; else anything that cannot be judged is; else it is a pass. Cannot be judged: a
report or bench that is missing or invalid, other questions or scoring rules, latency on another device, too few
samples.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from device_bench.judge import (
    PRESENCE,
    Allowances,
    Check,
    State,
    Tree,
    latency_checks,
    memory_check,
    parity_check,
    size_check,
)
from device_bench.judge_accuracy import Compared, Entry, Flip, accuracy_checks, compare
from vlm.errors import UserError
from vlm.folders import write_atomic

SEVERITY: tuple[State, ...] = ("regression", "cannot judge", "pass")
EXIT_CODES: dict[State, int] = {"pass": 0, "regression": 1, "cannot judge": 2}
GATE = Path("stages") / "gate.json"  # where a run folder keeps its last verdict


@dataclass(frozen=True)
class Verdict:
    """All checks of a comparison.

    `ignored` names the groups that were not judged, `notes` what had no counterpart, and `compared` is what the checks
    of accuracy were made from, with the answers that changed.
    """

    checks: list[Check]
    ignored: list[str]
    notes: list[str]
    compared: list[Compared]

    @property
    def state(self) -> State:
        """The worst of the checks; without any check nothing can be judged."""
        states = {check.state for check in self.checks}
        return next((state for state in SEVERITY if state in states), "cannot judge")

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regression, 2 cannot judge."""
        return EXIT_CODES[self.state]

    @property
    def reasons(self) -> list[str]:
        """One line for each check that is not a pass, regressions first."""
        bad = [check for state in SEVERITY[:2] for check in self.checks if check.state == state]
        return [_line(check) for check in bad] or ([] if self.checks else ["the baseline holds nothing to compare"])

    def record(self) -> Tree:
        """The plain values that report.json holds under "gate"."""
        return {
            "verdict": self.state,
            "reasons": self.reasons,
            "ignored": self.ignored,
            "notes": self.notes,
            "checks": [asdict(check) for check in self.checks],
            "flipped": {each.where: _flipped(each.flips) for each in self.compared},
        }


def gate(new: Path, baseline: Path, allowances: Allowances) -> Verdict:
    """Compare a report with a baseline.

    Args:
        new: report.json, or the folder it lies in.
        baseline: the older report.json; with its answer files in reach accuracy is judged paired, else by intervals.
        allowances: what may be worse, and by how much.
    Raises:
        UserError: a report is missing, broken or of another schema.
    """
    judged, folder = read_report(new)
    old, old_folder = read_report(baseline)
    pairs: list[tuple[str, Entry, Entry]] = []
    students = [(report.get("models") or {}).get("student") for report in (old, judged)]
    if students[0]:
        pairs.append(("student", Entry(students[0], old_folder), Entry(students[1] or {}, folder)))
    counterparts = {artifact_name(artifact): artifact for artifact in judged["artifacts"]}
    checks: list[Check] = []
    for artifact in old["artifacts"]:
        counterpart = counterparts.pop(artifact_name(artifact), None)
        found, benches = _artifact_checks(artifact, counterpart, (old_folder, folder), allowances)
        checks += found
        pairs += benches
    notes = [f"{name} is new: the baseline has no such artifact" for name in counterparts]
    return _verdict(checks, pairs, notes, allowances)


def _verdict(
    checks: list[Check], pairs: list[tuple[str, Entry, Entry]], notes: list[str], allowances: Allowances
) -> Verdict:
    ignored = [str(group) for group in allowances.ignore]
    outcomes = [] if "accuracy" in ignored else [compare(*pair) for pair in pairs]
    compared = [outcome for outcome in outcomes if isinstance(outcome, Compared)]
    unknown = [outcome for outcome in outcomes if isinstance(outcome, Check)]
    checks = [*accuracy_checks(compared, allowances), *unknown, *checks]
    return Verdict([check for check in checks if check.group not in ignored], ignored, notes, compared)


def _flipped(flips: list[Flip]) -> dict[str, int]:
    return {"lost": sum(flip.points < 0 for flip in flips), "won": sum(flip.points > 0 for flip in flips)}


def save(verdict: Verdict, new: Path) -> None:
    """Keep a verdict where its report lies in a run folder (runs/<name>/report), in stages/gate.json of the run.

    Reports drawn later show it as long as nothing is measured anew; the report that was judged is not changed.

    Args:
        verdict: from `gate`.
        new: the judged report.json, or the folder it lies in.
    Raises:
        UserError: the report is missing, broken or of another schema.
    """
    report, folder = read_report(new)
    if (folder.parent / GATE.parent).is_dir():
        tree = {"judged": (report.get("run") or {}).get("created"), "gate": verdict.record()}
        write_atomic(folder.parent / GATE, json.dumps(tree, indent=1) + "\n")


def read_report(path: Path) -> tuple[Tree, Path]:
    """Read a report.json, given itself, by its folder or by the run's folder, and say in which folder it lies.

    Raises:
        UserError: missing, not JSON, of another schema, or without what a comparison needs.
    """
    places = [path / "report.json", path / "report" / "report.json"] if path.is_dir() else [path]
    file = next((place for place in places if place.is_file()), places[0])
    if not file.is_file():
        raise UserError(
            f"{file}: no such report. pocketvlm report writes one from the results of a run; pocketvlm gate NEW "
            "--baseline FILE --update makes NEW the baseline."
        )
    try:
        tree = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}). Write the report again: pocketvlm report.") from error
    if not isinstance(tree, dict) or tree.get("schema") != 1 or not isinstance(tree.get("artifacts"), list):
        found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
        raise UserError(f"{file}: a report of schema 1 was expected, found {found}. Write it again: pocketvlm report.")
    for number, artifact in enumerate(tree["artifacts"], 1):
        if lacking := _lacking(artifact):
            raise UserError(f"{file}: artifact {number} has no {lacking}. Write the report again: pocketvlm report.")
    return tree, file.parent


def _lacking(artifact: Any) -> str:
    """What an artifact of a report lacks to be compared, "" if nothing."""
    if not isinstance(artifact, dict) or not (artifact.get("name") or {"format", "precision"} <= artifact.keys()):
        return "name, nor format and precision"
    if not isinstance(artifact.get("benches"), list):
        return "list of benches"
    whole = all(isinstance(bench, dict) and isinstance(bench.get("device"), dict) for bench in artifact["benches"])
    return "" if whole else "device in one of its benches"


def artifact_name(artifact: Tree) -> str:
    """The folder's name, "<format>-<precision>"."""
    return str(artifact.get("name") or f"{artifact['format']}-{artifact['precision']}")


Folders = tuple[Path | None, Path | None]  # where the baseline and the new report lie


Benches = list[tuple[str, Entry, Entry]]  # name and device, baseline, new


def _artifact_checks(
    old: Tree, new: Tree | None, folders: Folders, allowances: Allowances
) -> tuple[list[Check], Benches]:
    name = artifact_name(old)
    if new is None:
        return [_missing(name, "the new report has no such artifact")], []
    checks, benches = [*parity_check(name, old, new), *size_check(name, old, new, allowances)], []
    for bench in old["benches"]:
        where = f"{name} on {bench['device'].get('name') or bench['device'].get('kind')}"
        found = _counterpart(bench["device"], new["benches"])
        if why := _unusable(name, bench, found):
            checks.append(_missing(where, why))
        elif found:
            benches.append((where, Entry(bench, folders[0]), Entry(found, folders[1])))
            if "emulated" in (bench["device"].get("kind"), found["device"].get("kind")):
                continue  # its answers are right, its speed and memory are nobody's
            checks += latency_checks(where, bench, found, allowances)
            checks += memory_check(where, bench, found, allowances)
    return checks, benches


def _unusable(name: str, old: Tree, new: Tree | None) -> str:
    """Why two benches cannot be compared at all; "" if they can."""
    if new is None:
        return f"the new report has no bench of {name} on a {old['device'].get('kind')}"
    for record, which in ((old, "baseline"), (new, "new")):
        if not record.get("valid", True):
            return f"the {which} measurement is invalid: {record.get('invalid_because')}"
    return ""


def _counterpart(device: Tree, candidates: list[Tree]) -> Tree | None:
    """The bench on the same device, else the only one of the same model, else the only one of the same kind."""
    model = [b for b in candidates if all(b["device"].get(key) == device.get(key) for key in ("name", "soc"))]
    same = [b for b in model if b["device"].get("id") == device.get("id")]
    alike = [b for b in candidates if b["device"].get("kind") == device.get("kind")]
    if same:
        return same[0]
    return next((found[0] for found in (model, alike) if len(found) == 1), None)


def _missing(where: str, why: str) -> Check:
    return Check(where, PRESENCE, "-", None, None, None, "", None, "cannot judge", why)


def _line(check: Check) -> str:
    change = "" if check.change is None else f" {check.change:+g} {check.unit} (allowed {check.allowed:g})"
    why = f": {check.why}" if check.why else ""
    return f"{check.state}: {check.where}, {check.metric}{change}{why}"
