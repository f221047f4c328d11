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

from pocketvlm.console import exit_codes
from pocketvlm.study.curves import STEM as CURVES
from pocketvlm.study.gains import STEM as GAINS
from pocketvlm.study.markdown import interval, tables
from vlm.config import Config
from vlm.errors import UserError
from vlm.folders import write_atomic

HOME, DOCUMENT, FIGURES = Path("studies/evidence"), Path("docs/evidence.md"), "evidence"
Tree = dict[str, Any]


class Claim(Config):
    """A sentence that a study's row can confirm or not.

    Attributes:
        says: the sentence.
        by: who says it.
        study, equal, row, against, family: where the difference stands that it is about; `against` names one of the
            study's `pairs`, without it the row's own difference is meant.
        points: it holds if the difference is at least this,
        above: and the lower end of its 95 % interval is above this.
    """

    says: str
    by: str
    study: str
    row: str
    against: str | None = None
    equal: Literal["steps", "time"] = "steps"
    family: str = "avg"
    points: float
    above: float = 0.0


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
    """

    about: str
    sections: list[Section]
    claims: list[Claim]


def document(evidence: Evidence, results: dict[str, Tree]) -> str:
    """Put docs/evidence.md together.

    Args:
        evidence: what it consists of.
        results: study -> study.json.
    """
    lines = ["# Evidence", "", evidence.about.strip(), "", "## What is claimed, what is seen", ""]
    lines += ["| claim | by | study, comparison, row | seen, points | verdict |", "|---|---|---|---:|---|"]
    lines += [_claimed(claim, results) for claim in evidence.claims]
    lines += ["", *_cost(results), ""]
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
        seen = f"{found['points']:+.1f} ({interval(found['ci95'])}; {len(found['seeds'])} seeds)"
        holds = found["points"] >= claim.points and found["ci95"][0] > claim.above
        verdict = "confirmed" if holds else "**not confirmed**"
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


def _cost(results: dict[str, Tree]) -> list[str]:
    if not results:
        return ["No study has been run."]
    spent = [result["spent"] for result in results.values()]
    hours = sum(entry["seconds"] for entry in spent) / 3600
    machines = "; ".join(dict.fromkeys(entry["processor"] for entry in spent))
    trainings = sum(entry["trainings"] for entry in spent)
    return [f"All of it: {trainings} trainings, {hours:.1f} hours of one core ({machines})."]


def _study(name: str, result: Tree | None) -> list[str]:
    if result is None:
        return ["Not run yet: no result is in studies/evidence."]
    seeds, readings = ", ".join(map(str, result["config"]["seeds"])), len(result["readings"])
    split = f"test, read {readings} time{'s' * (readings != 1)}" if result["split"] == "test" else result["split"]
    return [f"Split: {split}. Seeds: {seeds}.", "", tables(result, "###", f"{FIGURES}/{name}-")]


def collect(evidence: Evidence, runs: Path, home: Path, figures: Path) -> None:
    """Take the studies' results and figures from a folder of runs; one that was not run there stays as it is."""
    for section in evidence.sections:
        source = runs / section.study
        if not (source / "study.json").is_file():
            continue
        write_atomic(home / f"{section.study}.json", (source / "study.json").read_text())
        figures.mkdir(parents=True, exist_ok=True)
        for figure in sorted(path for stem in (CURVES, GAINS) for path in source.glob(f"{stem}-*.svg")):
            shutil.copy2(figure, figures / f"{section.study}-{figure.name}")


def load(home: Path) -> tuple[Evidence, dict[str, Tree]]:
    """The document's description and the results that are there."""
    evidence = Evidence.load(home / "evidence.yaml")
    files = {section.study: home / f"{section.study}.json" for section in evidence.sections}
    return evidence, {study: json.loads(file.read_text()) for study, file in files.items() if file.is_file()}


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
