"""docs/evidence.md, from the results of the studies: `python -m pocketvlm.evidence [--collect RUNS]`.

studies/evidence/evidence.yaml says which studies, in which order, and what is claimed of them; <study>.json beside it
is the study.json of each. `--collect` takes those from a folder of runs first. A study that has no result is named as
missing, and what is claimed of it as not measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from device_bench.stats import widest
from pocketvlm.console import exit_codes
from pocketvlm.study.curves import STEM as CURVES
from pocketvlm.study.gains import STEM as GAINS
from pocketvlm.study.markdown import cost, interval, tables
from vlm.config import Config
from vlm.errors import UserError
from vlm.folders import write_atomic

HOME, DOCUMENT, FIGURES, MODELS = Path("studies/evidence"), Path("docs/evidence.md"), "evidence", "models.json"
Tree = dict[str, Any]


class Claim(Config):
    """A sentence that a study's row can confirm or not.

    Attributes:
        says: the sentence.
        by: who says it.
        study, equal, row, against, family: where the difference stands that it is about; `against` names one of the
            study's `pairs`, without it the row's own difference is meant.
        at_least: it holds if the difference is at least this and the lower end of its 95 % interval above `above`,
        at_most: or if it is at most this and the upper end below 0. One of both is given.
        above: 0 by default.
    """

    says: str
    by: str
    study: str
    row: str
    against: str | None = None
    equal: Literal["steps", "time"] = "steps"
    family: str = "avg"
    at_least: float | None = None
    at_most: float | None = None
    above: float = 0.0

    @model_validator(mode="after")
    def _one_bound(self) -> Claim:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"claim {self.says!r}: give at_least or at_most")
        return self

    def verdict(self, points: float, low: float, high: float) -> str:
        """What a difference with its 95 % interval says of the claim; refuted: all of the interval is beyond it."""
        if self.at_least is None:
            mirrored = self.model_copy(update={"at_least": -(self.at_most or 0.0), "at_most": None})
            return mirrored.verdict(-points, -high, -low)
        if points >= self.at_least and low > self.above:
            return "confirmed"
        return "**refuted**" if high < self.at_least else "**not confirmed**"


class Section(Config):
    """One study of the document: its name, a heading, and what it asks."""

    study: str
    title: str
    about: str


class Evidence(Config):
    """The document.

    Attributes:
        about: what it begins with.
        sections: its studies.
        claims: what is held against them.
        models: what the studies need beside their trainings -> the file below the folder of runs that says how long it
            took: processor_seconds, else seconds.
    """

    about: str
    sections: list[Section]
    claims: list[Claim]
    models: dict[str, str] = {}


def document(evidence: Evidence, results: dict[str, Tree], models: dict[str, float]) -> str:
    """Put docs/evidence.md together.

    Args:
        evidence: what it consists of.
        results: study -> study.json.
        models: what the studies need beside their trainings -> seconds it took.
    """
    lines = ["# Evidence", "", evidence.about.strip(), "", "## What is claimed, what is seen", ""]
    lines += ["| claim | by | study, comparison, row | seen, points | verdict |", "|---|---|---|---:|---|"]
    lines += [_claimed(claim, results) for claim in evidence.claims]
    lines += ["", *_cost(results, models), ""]
    for section in evidence.sections:
        lines += [
            f"## {section.title}",
            "",
            section.about.strip(),
            "",
            f"    pocketvlm ablate studies/{section.study}.yaml",
        ]
        lines += ["", *_study(section.study, results.get(section.study)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _claimed(claim: Claim, results: dict[str, Tree]) -> str:
    against = f" against {claim.against}" if claim.against else ""
    where = f"{claim.study}, equal {claim.equal}, {claim.row}{against}"
    seen, verdict = "", "not measured"
    if found := difference(claim, results.get(claim.study)):
        ends = widest(found)
        seen = f"{found['points']:+.1f} ({interval(ends)}; {len(found['seeds'])} seeds)"
        verdict = claim.verdict(found["points"], *ends)
    return f"| {claim.says} | {claim.by} | {where} | {seen} | {verdict} |"


def difference(claim: Claim, result: Tree | None) -> Tree | None:
    """The paired difference that a claim is about; None where it was not measured.

    Raises:
        UserError: the study has no such row.
    """
    if result is None:
        return None
    entries = result["pairs" if claim.against else "comparisons"].get(claim.equal, [])
    rows = {row["row"]: row for row in entries if claim.against in (None, row["against"])}
    if claim.row not in rows:
        raise UserError(
            f"evidence.yaml: study {claim.study} at equal {claim.equal} has no row {claim.row!r} against "
            f"{claim.against or 'another'}, only {', '.join(rows) or 'none'}."
        )
    found = rows[claim.row]["difference"]
    entry: Tree | None = found[claim.family] if found else None
    return entry


def _cost(results: dict[str, Tree], models: dict[str, float]) -> list[str]:
    if not results:
        return ["No study has been run."]
    made = [f"{name} {seconds / 60:.0f} min" for name, seconds in models.items()]
    beside = [f"Made for them: {', '.join(made)}."] if made else []
    return [f"All of it: {' '.join([cost([result['spent'] for result in results.values()]), *beside])}"]


def _study(name: str, result: Tree | None) -> list[str]:
    if result is None:
        return ["Not run yet: no result is in studies/evidence."]
    seeds, readings = ", ".join(map(str, result["config"]["seeds"])), len(result["readings"])
    split = f"test, read {readings} time{'s' * (readings != 1)}" if result["split"] == "test" else result["split"]
    return [f"Split: {split}. Seeds: {seeds}.", "", tables(result, "###", f"{FIGURES}/{name}-")]


def collect(evidence: Evidence, runs: Path, home: Path, figures: Path) -> None:
    """Take the studies' results and figures from a folder of runs; one that was not run there stays as it is."""
    models = load(home)[2]
    for name, file in evidence.models.items():
        if (runs / file).is_file():
            record = json.loads((runs / file).read_text())
            models[name] = record.get("processor_seconds", record["seconds"])
    write_atomic(home / MODELS, json.dumps(models, indent=1) + "\n")
    for section in evidence.sections:
        source = runs / section.study
        if not (source / "study.json").is_file():
            continue
        write_atomic(home / f"{section.study}.json", (source / "study.json").read_text())
        figures.mkdir(parents=True, exist_ok=True)
        for figure in sorted(path for stem in (CURVES, GAINS) for path in source.glob(f"{stem}-*.svg")):
            shutil.copy2(figure, figures / f"{section.study}-{figure.name}")


def load(home: Path) -> tuple[Evidence, dict[str, Tree], dict[str, float]]:
    """The document's description, the results that are there, and how long the models beside them took."""
    evidence = Evidence.load(home / "evidence.yaml")
    files = {section.study: home / f"{section.study}.json" for section in evidence.sections}
    results = {study: json.loads(file.read_text()) for study, file in files.items() if file.is_file()}
    return evidence, results, json.loads((home / MODELS).read_text()) if (home / MODELS).is_file() else {}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collect", type=Path, metavar="RUNS", help="take new results from this folder first")
    runs = parser.parse_args().collect
    if runs:
        collect(Evidence.load(HOME / "evidence.yaml"), runs, HOME, DOCUMENT.parent / FIGURES)
    write_atomic(DOCUMENT, document(*load(HOME)))
    print(DOCUMENT)


if __name__ == "__main__":
    with exit_codes():
        main()
