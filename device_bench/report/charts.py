"""The charts of what was measured: accuracy against size and speed, accuracy per family, latency distributions."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from device_bench.measure import percentile
from device_bench.report import wording
from device_bench.report.labels import Label, place_labels
from device_bench.report.sources import Tree
from device_bench.report.svg import COLOURS, Drawing, colour_of, drawing
from vlm.bars import is_four_bit

MARKERS = {"onnx": "o", "executorch": "s", "coreml": "D", "gguf": "^"}
_DOTS = 640
_ENOUGH = 20  # samples from which a 95th percentile is drawn
_LOG_FROM = 8.0  # a range wider than this many times is drawn on a logarithmic axis


@dataclass(frozen=True)
class Point:
    """One artifact on one device in a scatter chart; `low` and `high` end its interval."""

    artifact: Tree
    name: str
    x: float
    y: float
    low: float
    high: float


def accuracy_points(artifacts: Sequence[Tree], measure: str, student: float | None) -> list[Point]:
    """Artifacts that have both an accuracy and the measure, from valid results only.

    Args:
        measure: "bytes" (drawn in MB) or the name of a statistic of the bench (its median is drawn).
        student: the torch student's score; then the interval is the paired one around it.
    """
    points = []
    for artifact in artifacts:
        for bench in artifact["benches"]:
            x = _in_megabytes(artifact["bytes"]) if measure == "bytes" else _median(bench[measure])
            if x is None or not bench["accuracy"] or not bench["valid"]:
                continue
            average = bench["accuracy"]["avg"]
            low, high = average["ci95"]
            if student is not None and bench["difference"]:
                low, high = (student + end for end in bench["difference"]["ci95"])
            score, name = average["score"], wording.measured_name(artifact, bench)
            points.append(Point(artifact, name, x, score, min(low, score), max(high, score)))
    return points


def _in_megabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def _median(measured: Tree | float | None) -> float | None:
    return measured["p50"] if isinstance(measured, dict) else measured


def scatter(name: str, points: Sequence[Point], x_label: str, student: float | None) -> Markup:
    """Accuracy over one cost: a marker's shape and colour say the format, filled is wide, hollow four-bit."""
    with drawing(name, f"Accuracy against {x_label}, one marker per artifact", 280) as chart:
        axes = chart.axes
        _scale(axes, [point.x for point in points])
        for point in points:
            colour = colour_of(point.artifact["format"])
            axes.plot([point.x, point.x], [point.low, point.high], color=colour, linewidth=1.1, alpha=0.55, zorder=2)
            hollow = is_four_bit(point.artifact["precision"] or "")
            face = COLOURS["card"] if hollow else colour
            marker = MARKERS.get(point.artifact["format"], "o")
            style: dict[str, Any] = {"markersize": 7, "markerfacecolor": face, "markeredgewidth": 1.5}
            axes.plot(point.x, point.y, marker, color=colour, zorder=3, **style)
        axes.margins(x=0.16, y=0.16)
        axes.grid(axis="y")
        axes.set_xlabel(x_label)
        axes.set_ylabel("accuracy, %")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(length=0)
        _name_points(chart, points, student)
    return chart.svg


def _name_points(chart: Drawing, points: Sequence[Point], student: float | None) -> None:
    """Write each artifact's name beside its marker, and whose accuracy the dashed line is."""
    axes = chart.axes
    labels = [Label(p.name, colour_of(p.artifact["format"]), p.x, p.y) for p in points]
    covered = [(p.x, p.low, p.x, p.high) for p in points]
    if student is not None:
        axes.axhline(student, color=COLOURS["accent"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        left, right = axes.get_xlim()
        covered.append((left, student, right, student))
        axes.set_xlim(left, right)
        labels.append(Label("torch student", COLOURS["accent"], left, student))
    place_labels(chart.figure, axes, labels, covered)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers where the values span more than _LOG_FROM times."""
    if values and min(values) > 0 and max(values) / min(values) > _LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axes.tick_params(which="minor", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def families(models: Tree) -> Markup | None:
    """Accuracy per family of teacher, student and undistilled student as dots on a line, chance as a tick."""
    shown = [(who, models[who]["accuracy"]) for who in ("undistilled", "student", "teacher") if models[who]["accuracy"]]
    if not shown:
        return None
    tasks = list(shown[-1][1]["tasks"])
    rows = ["average", *tasks]
    description = "Accuracy per family of teacher, student, undistilled student and chance"
    with drawing("families", description, 52 + 36 * len(rows)) as chart:
        axes = chart.axes
        for row, task in enumerate(rows):
            axes.axhline(-row, color=COLOURS["rule"], linewidth=0.6, zorder=0)
            for offset, (who, accuracy) in zip((-0.2, 0.0, 0.2), shown, strict=False):
                _dot(axes, -row + offset, accuracy["avg"] if task == "average" else accuracy["tasks"].get(task), who)
            chance = shown[-1][1]["tasks"].get(task, {}).get("chance")
            if chance is not None:
                axes.plot([chance, chance], [-row - 0.34, -row + 0.34], color=COLOURS["muted"], linewidth=1.6, zorder=1)
        _rows(axes, [wording.family_name(row) for row in rows])
        axes.set_xlim(-2, 102)
        axes.set_xlabel("accuracy, %, with 95 % interval; upright tick: chance")
    return chart.svg


def _dot(axes: Axes, y: float, score: Tree | None, who: str) -> None:
    if not score:
        return
    colour = COLOURS["accent" if who == "student" else who]
    axes.plot(score["ci95"], [y, y], color=colour, linewidth=1.4, alpha=0.5, zorder=2)
    axes.plot(score["score"], y, "o", color=colour, markersize=6.5 if who == "student" else 5.5, zorder=3)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks([-row for row in range(len(names))], names)
    axes.set_ylim(-len(names) + 0.45, 0.55)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.spines["left"].set_visible(False)


def worth(difference: Tree) -> Markup:
    """What distillation was worth, per family, with the paired intervals and a line at nothing."""
    tasks = difference.get("tasks") or {}
    rows = {"average": difference, **tasks}
    with drawing("worth", "Points gained by distillation per family, with intervals", 52 + 36 * len(rows)) as chart:
        axes = chart.axes
        axes.axvline(0, color=COLOURS["muted"], linewidth=1.2, zorder=1)
        for row, (task, gain) in enumerate(rows.items()):
            axes.axhline(-row, color=COLOURS["rule"], linewidth=0.6, zorder=0)
            width, marker, size = (3.2, "D", 7) if task == "average" else (1.8, "o", 5.5)
            axes.plot(gain["ci95"], [-row, -row], color=COLOURS["accent"], linewidth=width, alpha=0.5, zorder=2)
            axes.plot(gain["points"], -row, marker, color=COLOURS["accent"], markersize=size, zorder=3)
        _rows(axes, [wording.family_name(row) for row in rows])
        axes.margins(x=0.08)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
        axes.set_xlabel("points gained, with paired 95 % interval")
    return chart.svg


def latency_strip(name: str, rows: Sequence[tuple[Tree, str, list[float]]], x_label: str) -> Markup:
    """Raw samples as dots, a row per artifact; the long tick is the median of all, the short one the 95th percentile.

    Of more than _DOTS samples evenly spaced ones are drawn.
    """
    with drawing(name, f"Distribution of {x_label} per artifact, a dot per sample", 46 + 30 * len(rows)) as chart:
        axes = chart.axes
        _scale(axes, [sample for _, _, samples in rows for sample in samples])
        for row, (artifact, title, samples) in enumerate(rows):
            colour = colour_of(artifact["format"])
            jitter = random.Random(f"{name} {title}")
            dots = samples[:: -(-len(samples) // _DOTS)]
            heights = [-row + jitter.uniform(-0.26, 0.26) for _ in dots]
            axes.axhline(-row, color=COLOURS["rule"], linewidth=0.6, zorder=0)
            alpha = 0.7 if len(dots) < 100 else 0.3
            axes.plot(dots, heights, "o", color=colour, markersize=3.4, alpha=alpha, markeredgewidth=0, zorder=3)
            _quantile(axes, samples, 50, row, half=0.38)
            if len(samples) >= _ENOUGH:
                _quantile(axes, samples, 95, row, half=0.22)
        _rows(axes, [title for _, title, _ in rows])
        axes.set_xlabel(x_label)
    return chart.svg


def _quantile(axes: Axes, samples: Sequence[float], percent: float, row: int, half: float) -> None:
    place = percentile(sorted(samples), percent)
    width = 1.5 if percent == 50 else 1
    axes.plot([place, place], [-row - half, -row + half], color=COLOURS["ink"], linewidth=width, zorder=2)
