"""The learning curves of a study: cross-entropy over steps, one line per row, its seeds as a band."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter

import device_bench.report
from device_bench.report.svg import COLOURS, drawing

if TYPE_CHECKING:
    from pocketvlm.study.summary import Comparison

STEM = "curves"  # of the figures' file names
HEIGHT, WIDTH = 360, 620  # pixels
_LINES = ("muted", "accent", "undistilled", "onnx", "executorch", "coreml")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (8, 3)))
_WINDOW = 5  # probes: one is the loss of a single batch


def draw(comparison: Comparison, rows: Sequence[str]) -> str:
    """Draw the figure; returns a whole SVG file with its colours, for light and dark pages."""
    with drawing(f"curves-{comparison.equal}", "Cross-entropy over steps, one line per row", HEIGHT, WIDTH) as chart:
        for index, row in enumerate(rows):
            curves = [_smoothed(cell.history()["rows"]) for cell in comparison.of(row)]
            if not curves:
                continue
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = [[curve[step] for curve in curves] for step in steps]  # [steps, seeds]
            colour, dash = COLOURS[_LINES[index % len(_LINES)]], _DASHES[index // len(_LINES) % len(_DASHES)]
            low, high = [min(v) for v in values], [max(v) for v in values]
            chart.axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            means = [statistics.fmean(v) for v in values]
            chart.axes.plot(steps, means, color=colour, linestyle=dash, linewidth=1.5, label=row)
        chart.axes.set_yscale("log")
        for level in (chart.axes.yaxis.set_major_formatter, chart.axes.yaxis.set_minor_formatter):
            level(FuncFormatter(lambda value, _: f"{value:g}"))
        chart.axes.grid(axis="y")
        chart.axes.tick_params(which="both", length=0)
        chart.axes.set_xlabel(f"step (mean of {_WINDOW} probes; band: all seeds)")
        chart.axes.set_ylabel("cross-entropy")
        if chart.axes.get_legend_handles_labels()[1]:
            chart.figure.legend(loc="outside upper left", labelcolor=COLOURS["ink"], ncols=2, handlelength=2.2)
    return standalone(str(chart.svg))


def _smoothed(rows: Sequence[dict]) -> dict[int, float]:
    """Step -> geometric mean of the cross-entropies of the probes around it; probes stand alone at a stage's ends."""
    result = {}
    for index, row in enumerate(rows):
        near = rows[max(0, index - _WINDOW // 2) : index + _WINDOW // 2 + 1]
        logs = [math.log(max(r["terms"]["sup"]["value"], 1e-6)) for r in near if r["stage"] == row["stage"]]
        result[row["step"]] = math.exp(statistics.fmean(logs))
    return result


def standalone(svg: str, height: int = HEIGHT) -> str:
    """Give a page's drawing the page's colours and font, so that it is a file of its own, `height` pixels high."""
    style = (Path(device_bench.report.__file__).parent / "style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    css = f"svg {{{light} font-family: sans-serif}} @media (prefers-color-scheme: dark) {{svg {{{dark}}}}}"
    head, end, body = svg.partition(">")
    size = f' width="{WIDTH}" height="{height}"'
    return f"{head}{size}{end}<style>{css}</style>{body}\n"
