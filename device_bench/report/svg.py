"""matplotlib figures as inline SVG whose colours are the page's own, so that one drawing serves light, dark and paper.

Every colour is drawn as a stand-in hex value and replaced by the CSS variable of the same name afterwards.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# CSS variable -> stand-in. The values only have to differ from each other and from black, which matplotlib leaves out.
COLOURS = {
    "ink": "#1a1b1c",
    "muted": "#6a6b6c",
    "rule": "#d1d2d3",
    "card": "#fdfcfb",
    "accent": "#0a6b5a",
    "teacher": "#5a5f8c",
    "undistilled": "#b5762a",
    "band": "#eeeff0",
    "onnx": "#2f6f9f",
    "executorch": "#a8513f",
    "coreml": "#7a5a9a",
    "gguf": "#4f7f3a",
    "loss": "#0a6b5b",
    "gradient": "#b5762b",
}
WIDTH = 410  # pixels; a phone shows a chart a little smaller than drawn, a wide page a little larger
_PIXELS_PER_INCH = 72
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11.0,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.labelsize": 10.5,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
}


class Drawing:
    """A figure being drawn: its axes, and after the block its SVG."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        self.figure, self.axes, self.svg = figure, axes, Markup("")


@contextmanager
def drawing(name: str, description: str, height: int, width: int = WIDTH) -> Iterator[Drawing]:
    """Yield a figure of one axes to draw into; its `svg` is ready when the block ends.

    Args:
        name: prefix of every id in the SVG, unique on the page.
        description: what the chart shows, for those who cannot see it.
        height, width: pixels.
    """
    settings: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(
            figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), dpi=_PIXELS_PER_INCH, layout="constrained"
        )
        result = Drawing(figure, figure.add_subplot())
        yield result
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    result.svg = inline(buffer.getvalue(), name, description)


def inline(svg: str, name: str, description: str) -> Markup:
    """Make matplotlib's SVG part of a page: no prologue or fixed size, ids of its own, the page's colours and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{name}-\1"', svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]+"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]+"', r"\1", svg, count=1)
    svg = re.sub(r"font-family: [^;\"]+;?", "", svg)
    svg = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, stand_in in COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    head = f'<svg class="chart" role="img" aria-label="{escape(description)}"'
    return Markup(svg.replace("<svg", head, 1))


def colour_of(format_: str | None) -> str:
    """The stand-in colour of an artifact's format."""
    return COLOURS.get(format_ or "", COLOURS["muted"])
