"""The charts of how the student was trained: the loss, and for each term its value and its gradient norm."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from device_bench.report.sources import Tree
from device_bench.report.svg import COLOURS, drawing

HEIGHT = 240


def losses(student: Tree, undistilled: Tree | None) -> Markup:
    """Total loss of the student, and the cross-entropy of both students, over the steps of the two stages."""
    with drawing("losses", "Training loss over steps, both stages", HEIGHT) as chart:
        axes = chart.axes
        _mark_stages(axes, student["rows"])
        _line(axes, student["rows"], lambda row: row["loss"], COLOURS["muted"], "student, all terms", dashed=True)
        _line(axes, student["rows"], lambda row: _of(row, "sup", "value"), COLOURS["accent"], "student, answers only")
        if undistilled:
            read = lambda row: _of(row, "sup", "value") or row["loss"]  # noqa: E731
            _line(axes, undistilled["rows"], read, COLOURS["undistilled"], "undistilled, answers only")
        _finish(axes, "loss")
        axes.legend(loc="upper right", labelcolor=COLOURS["ink"], handlelength=1.4)
    return chart.svg


def term(name: str, rows: Sequence[Tree]) -> Markup | None:
    """One term's value and the norm of its gradient, both logarithmic; None where the term was never logged."""
    if not any(_of(row, name, "value") for row in rows):
        return None
    with drawing(f"term-{name}", f"Value and gradient norm of the term {name} over steps", HEIGHT) as chart:
        axes = chart.axes
        _mark_stages(axes, rows)
        _line(axes, rows, lambda row: _of(row, name, "value"), COLOURS["loss"], "value")
        _line(axes, rows, lambda row: _of(row, name, "grad_norm"), COLOURS["gradient"], "gradient norm")
        if any(_of(row, name, "weight") not in (None, 1) for row in rows):
            _line(axes, rows, lambda row: _of(row, name, "weight"), COLOURS["muted"], "weight", dashed=True)
        _finish(axes, "")
        axes.legend(loc="upper right", labelcolor=COLOURS["ink"], handlelength=1.4, ncols=3, columnspacing=1.0)
    return chart.svg


def learning_rate(rows: Sequence[Tree]) -> Markup:
    """The learning rate over the steps."""
    with drawing("learning-rate", "Learning rate over steps", HEIGHT) as chart:
        axes = chart.axes
        _mark_stages(axes, rows)
        _line(axes, rows, lambda row: row["lr"], COLOURS["ink"], "learning rate")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(length=0)
        axes.grid(axis="y")
        axes.margins(x=0.01)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
    return chart.svg


def _of(row: Tree, term_name: str, key: str) -> float | None:
    value: float | None = (row.get("terms") or {}).get(term_name, {}).get(key)
    return value


def _line(axes: Axes, rows: Sequence[Tree], read: Any, colour: str, label: str, dashed: bool = False) -> None:
    """Draw what was logged; a step at which it was not, or was not positive, is left out of the logarithmic axis."""
    logged = [(row["step"], value) for row in rows if (value := read(row)) is not None and value > 0]
    if logged:
        steps, values = zip(*logged, strict=True)
        style = (0, (3, 2)) if dashed else "-"
        axes.plot(steps, values, color=colour, label=label, linewidth=1.1 if dashed else 1.5, linestyle=style)


def _mark_stages(axes: Axes, rows: Sequence[Tree]) -> None:
    """Shade every second stage and write each one's name at its start."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row.get("stage") != rows[i - 1].get("stage")]
    for index, start in enumerate(starts):
        end = starts[index + 1] if index + 1 < len(starts) else len(rows) - 1
        first, last = rows[start]["step"], rows[end]["step"]
        if index % 2 == 0 and len(starts) > 1:
            axes.axvspan(first, last, color=COLOURS["band"], linewidth=0, zorder=0)
        place: dict[str, Any] = {
            "transform": axes.get_xaxis_transform(),
            "fontsize": 9.5,
            "va": "bottom",
            "color": COLOURS["muted"],
        }
        axes.text(first, 1.01, f" {rows[start].get('stage', '')}", **place)


def _finish(axes: Axes, y_label: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", length=0)
    axes.grid(axis="y")
    axes.margins(x=0.01, y=0.12)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.14)  # room for the legend above the lines
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
