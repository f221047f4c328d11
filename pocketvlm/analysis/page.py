"""index.html of an analysis: one self-contained file with two figures and a picture per question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_bench.pictures import data_uri
from device_bench.report.svg import COLOURS, drawing
from device_bench.templates import template

if TYPE_CHECKING:
    import numpy as np
    from markupsafe import Markup

_HERE = Path(__file__).parent
_HEIGHT = 260  # pixels of a figure
_HEAT = (255, 200, 0)  # colour of attention over the darkened picture


def page(result: dict[str, Any]) -> str:
    """Draw the page.

    Args:
        result: what analysis.json holds, each prompt with its picture besides.
    """
    prompts = [
        {**prompt, "picture": data_uri(prompt["seen"], "PNG"), "heat": heat(prompt["attention"])}
        for prompt in result["prompts"]
    ]
    return template(_HERE, "page.html.j2").render(
        result=result,
        prompts=prompts,
        adjacent=_adjacent(result["similarity"]),
        modalities=_modalities(result["similarity"]),
    )


def _adjacent(curves: dict[str, Any]) -> Markup:
    with drawing("adjacent", "Cosine similarity of each layer's input and output", _HEIGHT) as chart:
        for name, colour, label in (("vision", "accent", "vision tokens"), ("text", "undistilled", "text tokens")):
            found = curves[f"adjacent_{name}"]
            _line(chart.axes, range(1, len(found["mean"]) + 1), found, COLOURS[colour], label)
        _finish(chart.axes, "layer", "cosine of input and output")
        chart.axes.legend(loc="lower right", labelcolor=COLOURS["ink"])
    return chart.svg


def _modalities(curves: dict[str, Any]) -> Markup:
    with drawing("modalities", "Cosine similarity of vision and text features after each layer", _HEIGHT) as chart:
        found = curves["vision_text"]
        _line(chart.axes, range(len(found["mean"])), found, COLOURS["teacher"], "vision and text")
        _finish(chart.axes, "after layer (0: before the first)", "mean cosine of all pairs")
    return chart.svg


def _line(axes: Any, layers: range, found: dict[str, list[float]], colour: str, label: str) -> None:
    axes.fill_between(layers, found["min"], found["max"], color=colour, alpha=0.15, linewidth=0)
    axes.plot(layers, found["mean"], color=colour, marker="o", markersize=3.5, label=label)


def _finish(axes: Any, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(length=0)
    axes.grid(axis="y")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def heat(attention: list[list[float]]) -> str:
    """Data URI of a picture of G x G pixels: opaque colour where attention is highest, dark where there is none."""
    import numpy as np
    from PIL import Image

    values = np.array(attention)  # [G, G]
    scaled = values / max(values.max(), 1e-12)
    layer: np.ndarray = np.zeros((*values.shape, 4), dtype=np.uint8)  # [G, G, RGBA]
    layer[..., :3] = (np.array(_HEAT) * scaled[..., None]).astype(np.uint8)
    layer[..., 3] = 150
    return data_uri(Image.fromarray(layer, "RGBA"), "PNG")
