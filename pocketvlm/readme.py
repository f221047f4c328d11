"""Writes the table of real figures into README.md: `python -m pocketvlm.readme runs/tiny/report/report.json`.

Everything between the two marks is made from a report.json or from the part of one that is kept as a baseline; both
give the same text, so a test can tell a table that was typed by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from device_bench.gate import read_report
from device_bench.report import wording
from pocketvlm.console import exit_codes
from vlm.errors import UserError
from vlm.folders import write_atomic

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
MODELS = {"teacher": "teacher", "student": "distilled student", "undistilled": "the same student, not distilled"}
COLUMNS = (
    "artifact",
    "size, MB",
    "parity: logits cosine",
    "accuracy, % (95 % interval)",
    "against the torch student, points",
    "vision, ms",
    "first token, ms",
    "decode, tokens/s",
    "peak RSS, MiB",
)
NOTHING = "n/a"

Record = dict[str, Any]


def block(report: Record) -> str:
    """The text between the marks.

    Args:
        report: the tree of report.json, or of a baseline made from it.
    """
    rows = [_row(artifact, bench, report) for artifact in report["artifacts"] for bench in artifact["benches"] or [{}]]
    parts = [
        _accuracies(report["models"]),
        "\n".join([f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1), *rows]),
        _absent(report["artifacts"]),
        _origin(report),
    ]
    return "\n\n".join(part for part in parts if part)


def rewrite(readme: str, text: str) -> str:
    """Put a text between the marks.

    Raises:
        UserError: README.md has not exactly one pair of them.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise UserError(f"README.md: one {BEGIN} and after it one {END} were expected. Put them where the table goes.")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def _accuracies(models: Record) -> str:
    """Teacher and both students in one sentence; what was not evaluated is left out."""
    known = {who: (models.get(who) or {}).get("accuracy") for who in MODELS}
    said = [f"{MODELS[who]} {_score(accuracy)}" for who, accuracy in known.items() if accuracy]
    return f"Accuracy in torch, average of the six benchmark families, in percent: {'; '.join(said)}." if said else ""


def _row(artifact: Record, bench: Record, report: Record) -> str:
    student = (report["models"].get("student") or {}).get("accuracy")
    usable = bench if bench.get("valid", True) else {}
    accuracy = usable.get("accuracy")
    cells = [
        wording.display_name(artifact),
        wording.megabytes(artifact["bytes"]) if artifact["bytes"] else NOTHING,
        _parity(artifact["parity"]),
        _score(accuracy) if accuracy else NOTHING,
        wording.points(accuracy["avg"]["score"] - student["avg"]["score"]) if accuracy and student else NOTHING,
        *(wording.number(usable[key]["p50"]) if usable.get(key) else NOTHING for key in _MEDIANS),
        wording.number(usable["peak_rss_mb"]) if usable.get("peak_rss_mb") else NOTHING,
    ]
    return f"| {' | '.join(cells)} |"


_MEDIANS = ("vision_ms", "ttft_ms", "decode_tok_s")


def _score(accuracy: Record) -> str:
    average = accuracy["avg"]
    return f"{wording.percent(average['score'])} ({wording.percent_interval(average['ci95'])})"


def _parity(parity: Record | None) -> str:
    if parity is None or parity["logits_cos"] is None:
        return "not compared"
    cosine = wording.rung_value("cosine", parity["logits_cos"])
    return cosine if parity["passed"] else f"{cosine}, failed"


def _absent(artifacts: list[Record]) -> str:
    """Why numbers are missing, each reason once, with the artifacts it is about."""
    about: dict[str, list[str]] = {}
    for artifact in artifacts:
        reasons = [bench.get("reasons") or {} for bench in artifact["benches"]]
        shown = {given[key] for given in reasons for key in (*_MEDIANS, "peak_rss_mb", "accuracy") if key in given}
        for why in [*sorted(shown), *(b["invalid_because"] for b in artifact["benches"] if b.get("invalid_because"))]:
            about.setdefault(why, []).append(wording.display_name(artifact))
    return "\n".join(f"{NOTHING}, {' and '.join(names)}: {why}." for why, names in about.items())


def _origin(report: Record) -> str:
    """Machine, date and command."""
    benches = [bench for artifact in report["artifacts"] for bench in artifact["benches"]]
    devices = {_device(bench["device"]): None for bench in benches}
    name = (report["run"] or {}).get("name")
    command = "make mobile" if name == "tiny" else f"pocketvlm run configs/{name}.yaml"
    machine = f" on {'; '.join(devices)}" if devices else ""
    return f"Medians{machine}. Written by `{command}`; parity is the worst probe against the reference that judges."


def _device(device: Record) -> str:
    """A machine by its processor, which says more about speed than its name."""
    name = device.get("soc") or device.get("name") or "an unknown machine"
    return f"{name}, {device['cpus']} CPUs" if device.get("cpus") else str(name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="report.json of a run, or a baseline made from one")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    arguments = parser.parse_args()
    with exit_codes():
        report, _ = read_report(arguments.report)
        write_atomic(arguments.readme, rewrite(arguments.readme.read_text(), block(report)))
        print(f"{arguments.readme}: figures of {arguments.report}")


if __name__ == "__main__":
    main()
