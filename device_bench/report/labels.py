"""Puts labels beside points so that they cover neither each other nor a point."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_CHARACTER, _LINE, _GAP = 5.8, 12.0, 8.0  # pixels of 10-pixel text
Box = tuple[float, float, float, float]
# Where a label may stand relative to its point: right, left, above, below, the corners, and a line further.
_PLACES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1), (1, 2), (1, -2), (-1, 2), (-1, -2))
_OUTSIDE = 6.0  # leaving the frame is worse than covering something


@dataclass(frozen=True)
class Label:
    """A text to be written beside a point, in data coordinates."""

    text: str
    colour: str
    x: float
    y: float


def place_labels(figure: Figure, axes: Axes, labels: Sequence[Label], covered: Sequence[Box]) -> None:
    """Write each label at the first place around its point where it covers least.

    Args:
        figure: that is drawn.
        axes: with its limits and scales final.
        labels: in the order of importance.
        covered: boxes (left, bottom, right, top) in data coordinates that labels should keep clear of.
    """
    figure.draw_without_rendering()
    window = axes.get_window_extent()
    frame = window.x0, window.y0, window.x1, window.y1
    pixels = [axes.transData.transform((label.x, label.y)) for label in labels]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    taken += [_widened(axes.transData.transform([(left, low), (right, high)])) for left, low, right, high in covered]
    for label, (x, y) in zip(labels, pixels, strict=True):
        boxes = [_box(x, y, place, len(label.text) * _CHARACTER) for place in _PLACES]
        costs = [_cost(box, taken, frame) for box in boxes]
        best = boxes[costs.index(min(costs))]
        taken.append(best)
        place = best[0], (best[1] + best[3]) / 2
        axes.annotate(label.text, place, xycoords="figure pixels", fontsize=10, color=label.colour, va="center")


def _widened(corners: np.ndarray) -> Box:
    (left, low), (right, high) = corners
    return left - 2, low - 2, right + 2, high + 2


def _box(x: float, y: float, place: tuple[int, int], width: float) -> Box:
    across, up = place
    left = x + _GAP if across > 0 else x - _GAP - width if across < 0 else x - width / 2
    middle = y + up * _LINE
    return left, middle - _LINE / 2, left + width, middle + _LINE / 2


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """Area that is covered already or lies outside the frame."""
    inside = _overlap(box, frame)
    outside = (box[2] - box[0]) * (box[3] - box[1]) - inside
    return sum(_overlap(box, other) for other in taken) + _OUTSIDE * outside


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
