"""index.html: one self-contained file, drawn from the report and the raw samples it points to."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from device_bench.report import charts, curves, wording
from device_bench.report.devices import comparison, device_pages
from device_bench.report.method import method_notes
from device_bench.report.pictures import picture
from device_bench.report.sources import Tree
from device_bench.report.table import table
from device_bench.templates import template

_HERE = Path(__file__).parent
COSTS = {
    "bytes": ("Accuracy against size", "size, MB"),
    "decode_tok_s": ("Accuracy against decoding speed", "decode, tokens/s"),
    "ttft_ms": ("Accuracy against time to the first token", "first token, ms"),
    "peak_rss_mb": ("Accuracy against memory", "peak resident memory, MiB"),
}


def page(report: Tree, samples: dict[tuple[str, str], Tree]) -> str:
    """Draw the page.

    Args:
        report: from `build`.
        samples: raw samples by (run, file), from `raw_samples`.
    """
    columns, rows, notes = table(report)
    seconds = [stage["seconds"] for stage in report["stages"] if stage["seconds"]]
    return template(_HERE, "page.html.j2").render(
        wording=wording,
        picture=picture,
        report=report,
        headline=wording.headline(report),
        columns=columns,
        rows=rows,
        footnotes=notes,
        result_charts=_result_charts(report),
        training_charts=_training_charts(report["training"]),
        devices=device_pages(report, samples),
        comparison=comparison(report),
        method=method_notes(report),
        stages_longest=max(seconds, default=0),
        stages_total=sum(seconds),
        benches=[(artifact, bench) for artifact in report["artifacts"] for bench in artifact["benches"]],
    )


def _result_charts(report: Tree) -> list[Tree]:
    """Accuracy against each cost, accuracy per family, and what distillation was worth per family."""
    accuracy = report["models"]["student"]["accuracy"]
    student = accuracy["avg"]["score"] if accuracy else None
    found: list[Tree] = []
    for measure, (title, label) in COSTS.items():
        if points := charts.accuracy_points(report["artifacts"], measure, student):
            text = (
                "Whiskers are the paired 95 % interval of the difference to the torch student."
                if student is not None
                else ""
            )
            found.append(_chart(title, charts.scatter(f"cost-{measure}", points, label, student), text))
    if families := charts.families(report["models"]):
        found.append(_chart("Accuracy per family", families, "", legend=True))
    if difference := report["distillation"]["difference"]:
        text = "The distilled student minus the same student trained without a teacher, on the same questions."
        found.append(_chart("What distillation was worth", charts.worth(difference), text))
    return found


def _training_charts(training: Tree) -> list[Tree]:
    student = training["student"]
    if not student or not student["rows"]:
        return []
    found = [_chart("Loss", curves.losses(student, training["undistilled"]), "")]
    for name in student.get("terms", []):
        if drawn := curves.term(name, student["rows"]):
            found.append(_chart(wording.TERM_NAMES.get(name, name), drawn, ""))
    return [*found, _chart("Learning rate", curves.learning_rate(student["rows"]), "")]


def _chart(title: str, svg: Markup, text: str, legend: bool = False) -> dict[str, Any]:
    return {"title": title, "svg": svg, "text": text, "legend": legend}
