"""When a method helps: the gain of rows over what they are against, along one axis or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from device_bench.report.svg import COLOURS, drawing
from device_bench.stats import widest
from pocketvlm.study.curves import standalone

STEM = "gains"  # of the figures' file names
PANEL, WIDTH = 220, 620  # pixels; of one axis


def gains(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """Axis -> (place, paired difference) of the rows that have a place and were compared, in order of place."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        for axis, place in row["at"].items() if row["difference"] else ():
            found.setdefault(axis, []).append((place, row["difference"]["avg"]))
    return {axis: sorted(points, key=lambda point: point[0]) for axis, points in found.items()}


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """Draw one panel per axis; returns a whole SVG file.

    Args:
        rows: of one comparison in study.json.
    """
    axes = gains(rows)
    height = PANEL * max(1, len(axes))
    with drawing("gains", "Gain in points over what each row is against, with 95 % intervals", height, WIDTH) as chart:
        chart.axes.remove()
        panels = chart.figure.subplots(max(1, len(axes)), 1, squeeze=False)[:, 0]
        for panel, (axis, points) in zip(panels, axes.items(), strict=False):
            places = [str(f"{place:g}") for place, _ in points]  # as categories: an axis may have no scale
            middle = [found["points"] for _, found in points]
            below = [max(0.0, found["points"] - widest(found)[0]) for _, found in points]
            beyond = [max(0.0, widest(found)[1] - found["points"]) for _, found in points]
            panel.axhline(0, color=COLOURS["rule"], linewidth=1)
            panel.errorbar(places, middle, [below, beyond], color=COLOURS["accent"], marker="o", capsize=3)
            panel.set_xlabel(axis)
            panel.set_ylabel("points")
            panel.tick_params(which="both", length=0)
    return standalone(str(chart.svg), height)
