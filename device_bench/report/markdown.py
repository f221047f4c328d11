"""report.md: what a reviewer of a pull request needs, failing things first."""

import re

from device_bench.report import wording
from device_bench.report.sources import Tree
from device_bench.report.table import Cell, Row, table

_SIGNS = {"pass": "✅", "fail": "❌", "unknown": "❔"}


def markdown(report: Tree) -> str:
    """Draw a report as GitHub-flavoured markdown."""
    parts = [
        f"## pocketvlm: {escape(report['run']['name'])}",
        escape(wording.headline(report)),
        "\n".join(f"- {_SIGNS[verdict['state']]} {escape(verdict['text'])}" for verdict in report["verdicts"]),
        _failed_rungs(report["artifacts"]),
        _models(report),
        _table(report),
        _left_out(report["left_out"]),
        _changes(report["artifacts"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Make text inert in markdown: no table cell ends, no markup, no HTML, no line breaks, no mentions."""
    text = re.sub(r"\s+", " ", str(text)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text).replace("@", "@\N{ZERO WIDTH NON-JOINER}")


def _failed_rungs(artifacts: list[Tree]) -> str:
    lines = []
    for artifact in artifacts:
        for rung in (artifact["parity"] or {"rungs": []})["rungs"]:
            if not rung["passed"]:
                value, bar = (_rung(rung["metric"], rung[key]) for key in ("value", "bar"))
                name = escape(wording.display_name(artifact))
                lines.append(f"- **{name}** {rung['name']} {escape(rung['metric'])}: {value}, bar {bar}")
    return "\n".join(["### Under the bar", *lines]) if lines else ""


def _rung(metric: str, value: float | None) -> str:
    return "not measured" if value is None else wording.rung_value(metric, value)


def _models(report: Tree) -> str:
    rows = ["| | parameters | accuracy, % | 95 % |", "|---|---:|---:|---:|"]
    titles = {"teacher": "teacher", "undistilled": "student, not distilled", "student": "student, distilled"}
    for who, title in titles.items():
        model = report["models"][who]
        size = wording.parameters(model["params"]) if model["params"] else "n/a"
        average = model["accuracy"]["avg"] if model["accuracy"] else None
        score = wording.percent(average["score"]) if average else "n/a"
        interval = wording.percent_interval(average["ci95"]) if average else "n/a"
        rows.append(f"| {title} | {size} | {score} | {interval} |")
    return "\n".join(rows)


def _table(report: Tree) -> str:
    columns, rows, notes = table(report)
    head = "| artifact | " + " | ".join(f"{title}, {unit}" for title, unit in columns) + " |"
    lines = [head, "|---|" + "---:|" * len(columns), *(_line(row) for row in rows)]
    lines += ["", *(f"{index}. {escape(note)}" for index, note in enumerate(notes, 1))] if notes else []
    return "\n".join(lines)


def _left_out(entries: list[Tree]) -> str:
    lines = [f"- {escape(entry['name'])}: {escape(entry['why'])}" for entry in entries]
    return "\n".join(["Left out of this report:", *lines]) if lines else ""


def _line(row: Row) -> str:
    names = [row.name, *(f"({badge})" for badge in row.badges)]
    return f"| {_SIGNS[row.state]} {escape(' '.join(names))} | " + " | ".join(map(_text, row.cells)) + " |"


def _text(cell: Cell) -> str:
    if cell.note:
        return f"n/a ({cell.note})"
    return f"{cell.main} ({cell.below})" if cell.below and not cell.below.startswith(("p95", "min")) else cell.main


def _changes(artifacts: list[Tree]) -> str:
    lines = []
    for artifact in artifacts:
        for bench in artifact["benches"]:
            change = bench["changed"]
            if change and change["changed"]:
                counts = (
                    f"{change['changed']} of {change['compared']}, {change['lost']} worse, {change['gained']} better"
                )
                lines.append(f"- {escape(wording.display_name(artifact))}: {counts}")
    return "\n".join(["Answers that differ from the torch student's:", *lines]) if lines else ""
