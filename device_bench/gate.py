"""The gate: is the new report no worse than the baseline? Pass, regression or cannot judge: exit code 0, 1 or 2.

A regression anywhere is the verdict; else anything that cannot be judged is; else it is a pass. Cannot be judged: a
report or bench that is missing or invalid, other questions or scoring rules, latency on another device, too few
samples.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from device_bench.judge import (
    PRESENCE,
    Allowances,
    Check,
    Entry,
    State,
    Tree,
    accuracy_checks,
    latency_checks,
    memory_check,
    parity_check,
    size_check,
)
from device_bench.metrics import LATENCY_NAMES
from vlm.errors import UserError
from vlm.folders import write_atomic

SEVERITY: tuple[State, ...] = ("regression", "cannot judge", "pass")
EXIT_CODES: dict[State, int] = {"pass": 0, "regression": 1, "cannot judge": 2}
# What a baseline in git keeps of an artifact and of a bench: all that the gate reads but samples and answers.
ARTIFACT_KEYS = ("name", "format", "precision", "bytes", "parity")
BENCH_KEYS = ("device", "valid", "invalid_because", *LATENCY_NAMES, "peak_rss_mb", "accuracy", "reasons")
GATE = Path("stages") / "gate.json"  # where a run folder keeps its last verdict
COLUMNS = ("what", "metric", "baseline", "new", "change", "allowed", "verdict")


@dataclass(frozen=True)
class Verdict:
    """All checks of a comparison; `ignored` names the groups that were not judged, `notes` what had no counterpart."""

    checks: list[Check]
    ignored: list[str]
    notes: list[str]

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
        }


def gate(new: Tree | Path, baseline: Path, allowances: Allowances, folder: Path | None = None) -> Verdict:
    """Compare a report with a baseline.

    Args:
        new: report.json, its path, or the folder it lies in.
        baseline: the older report.json; with its answer files in reach accuracy is judged paired, else by intervals.
        allowances: what may be worse, and by how much.
        folder: where `new` lies if it is given as a tree.
    Raises:
        UserError: a report is missing, broken or of another schema.
    """
    if isinstance(new, Path):
        new, folder = read_report(new)
    old, old_folder = read_report(baseline)
    checks: list[Check] = []
    student = [(report.get("models") or {}).get("student") for report in (old, new)]
    if student[0]:
        checks += accuracy_checks("student", Entry(student[0], old_folder), Entry(student[1] or {}, folder), allowances)
    counterparts = {artifact_name(artifact): artifact for artifact in new["artifacts"]}
    for artifact in old["artifacts"]:
        counterpart = counterparts.pop(artifact_name(artifact), None)
        checks += _artifact_checks(artifact, counterpart, (old_folder, folder), allowances)
    notes = [f"{name} is new: the baseline has no such artifact" for name in counterparts]
    ignored = [str(group) for group in allowances.ignore]
    return Verdict([check for check in checks if check.group not in ignored], ignored, notes)


def save(verdict: Verdict, new: Path) -> None:
    """Put a verdict into the report it is about, as "gate".

    Where the report lies in a run folder (runs/<name>/report), the run keeps the verdict too, in stages/gate.json:
    reports drawn later show it as long as nothing is measured anew.

    Args:
        verdict: from `gate`.
        new: the judged report.json, or the folder it lies in.
    Raises:
        UserError: the report is missing, broken or of another schema.
    """
    report, folder = read_report(new)
    record, stages = verdict.record(), folder.parent / GATE.parent
    report["gate"] = record
    report["reasons"] = {key: why for key, why in report.get("reasons", {}).items() if key != "gate"}
    file = folder / "report.json" if new.is_dir() else new
    write_atomic(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if stages.is_dir():
        judged = (report.get("run") or {}).get("created")
        write_atomic(folder.parent / GATE, json.dumps({"judged": judged, "gate": record}, indent=1) + "\n")


def read_report(path: Path) -> tuple[Tree, Path]:
    """Read a report.json and say in which folder it lies.

    Raises:
        UserError: missing, not JSON, or of another schema.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such report. pocketvlm report writes one from the results of a run.")
    try:
        tree = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}). Write the report again: pocketvlm report.") from error
    if not isinstance(tree, dict) or tree.get("schema") != 1 or not isinstance(tree.get("artifacts"), list):
        found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
        raise UserError(f"{file}: a report of schema 1 was expected, found {found}. Write it again: pocketvlm report.")
    return tree, file.parent


def slim(report: Tree) -> Tree:
    """The part of a report that a baseline in git needs: what the gate and README.md's figures are made from, without
    paths to samples and answers."""
    artifacts = [
        {
            **{key: artifact.get(key) for key in ARTIFACT_KEYS},
            "benches": [{key: bench.get(key) for key in BENCH_KEYS} for bench in artifact["benches"]],
        }
        for artifact in report["artifacts"]
    ]
    models = {who: {"accuracy": model["accuracy"]} for who, model in report["models"].items() if model.get("accuracy")}
    return {
        "schema": 1,
        "run": report.get("run"),
        "models": models,
        "artifacts": artifacts,
        "gate": None,
    }


def artifact_name(artifact: Tree) -> str:
    """The folder's name, "<format>-<precision>"."""
    return str(artifact.get("name") or f"{artifact['format']}-{artifact['precision']}")


Folders = tuple[Path | None, Path | None]  # where the baseline and the new report lie


def _artifact_checks(old: Tree, new: Tree | None, folders: Folders, allowances: Allowances) -> list[Check]:
    name = artifact_name(old)
    if new is None:
        return [_missing(name, "the new report has no such artifact")]
    checks = [*parity_check(name, old, new), *size_check(name, old, new, allowances)]
    for bench in old["benches"]:
        checks += _bench_checks(name, bench, new["benches"], folders, allowances)
    return checks


def _bench_checks(
    name: str, old: Tree, candidates: list[Tree], folders: Folders, allowances: Allowances
) -> list[Check]:
    device = old["device"]
    where = f"{name} on {device.get('name') or device.get('kind')}"
    found = _counterpart(device, candidates)
    if found is None:
        return [_missing(where, f"the new report has no bench of {name} on a {device.get('kind')}")]
    for record, which in ((old, "baseline"), (found, "new")):
        if not record.get("valid", True):
            return [_missing(where, f"the {which} measurement is invalid: {record.get('invalid_because')}")]
    return [
        *accuracy_checks(where, Entry(old, folders[0]), Entry(found, folders[1]), allowances),
        *latency_checks(where, old, found, allowances),
        *memory_check(where, old, found, allowances),
    ]


def _counterpart(device: Tree, candidates: list[Tree]) -> Tree | None:
    """The bench on the same device, else the only one on a device of the same kind."""
    same = [b for b in candidates if all(b["device"].get(key) == device.get(key) for key in ("name", "soc"))]
    alike = [b for b in candidates if b["device"].get("kind") == device.get("kind")]
    return same[0] if same else alike[0] if len(alike) == 1 else None


def _missing(where: str, why: str) -> Check:
    return Check(where, PRESENCE, "-", None, None, None, "", None, "cannot judge", why)


def markdown(verdict: Verdict) -> str:
    """The verdict as Markdown for a pull request: the reasons, and every check folded away."""
    lines = [f"### Gate: {verdict.state}", "", *(f"* {reason}" for reason in verdict.reasons)]
    lines += [f"* not judged: {', '.join(verdict.ignored)}"] if verdict.ignored else []
    lines += [f"* {note}" for note in verdict.notes]
    lines += ["", f"<details><summary>{len(verdict.checks)} checks</summary>", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in _cells(check))} |" for check in verdict.checks]
    return "\n".join([*lines, "", "</details>", ""])


def table(verdict: Verdict) -> Table:
    """The verdict as a terminal table, regressions first, passes last."""
    colour = {"pass": "green", "regression": "red", "cannot judge": "yellow"}
    drawn = Table(title=f"Gate: {verdict.state}", title_style=colour[verdict.state])
    for column in COLUMNS:
        drawn.add_column(column, justify="right" if column in ("baseline", "new", "change", "allowed") else "left")
    for check in sorted(verdict.checks, key=lambda check: SEVERITY.index(check.state)):
        drawn.add_row(*_cells(check), style=None if check.state == "pass" else colour[check.state])
    return drawn


def _cells(check: Check) -> list[str]:
    change = "" if check.change is None else f"{check.change:+g} {check.unit}"
    allowed = "" if check.allowed is None else f"{check.allowed:g}"
    state = f"{check.state}: {check.why}" if check.state != "pass" and check.why else check.state
    return [check.where, check.metric, _number(check.baseline), _number(check.new), change, allowed, state]


def _line(check: Check) -> str:
    change = "" if check.change is None else f" {check.change:+g} {check.unit} (allowed {check.allowed:g})"
    why = f": {check.why}" if check.why else ""
    return f"{check.state}: {check.where}, {check.metric}{change}{why}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
