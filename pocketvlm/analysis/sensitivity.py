"""sensitivity.json and its chart, one self-contained page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_bench.report.svg import COLOURS, drawing
from device_bench.templates import template
from vlm.folders import finished_folder

if TYPE_CHECKING:
    from markupsafe import Markup

_HERE = Path(__file__).parent
_ROW, _MARGIN, _WIDTH = 17, 60, 760  # pixels of a layer, of the axis, and across
_SMALLEST = 1e-9  # nats: what the logarithmic axis still shows


def write(result: dict[str, Any], name: str, out: Path) -> None:
    """Write `out`/sensitivity.json and `out`/index.html.

    Args:
        result: `export.sensitivity.tree`.
        name: of the checkpoint.
        out: the folder to make.
    """
    with finished_folder(out) as folder:
        (folder / "sensitivity.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "index.html").write_text(page(result, name))


def page(result: dict[str, Any], name: str) -> str:
    """Draw the page."""
    return template(_HERE, "sensitivity.html.j2").render(result=result, name=name, chart=_chart(result["layers"]))


def _chart(layers: list[dict[str, Any]]) -> Markup:
    """One row per layer: the divergence with 4 and with 8 bits, on a logarithmic axis."""
    height = _MARGIN + _ROW * len(layers)
    with drawing("sensitivity", "Divergence of the answers when one layer is rounded", height, _WIDTH) as chart:
        axes, rows = chart.axes, range(len(layers))
        narrow, wide = ([max(entry[key], _SMALLEST) for entry in layers] for key in ("kl_4", "kl_8"))
        axes.hlines(rows, wide, narrow, color=COLOURS["rule"], linewidth=2)
        axes.plot(narrow, rows, "o", color=COLOURS["undistilled"], markersize=5, label="4 bits")
        axes.plot(wide, rows, "o", color=COLOURS["accent"], markersize=5, label="8 bits")
        axes.set_xscale("log")
        axes.set_yticks(rows, [entry["name"] for entry in layers])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.grid(axis="x")
        axes.set_xlabel("KL per token of the answers, nats")
        axes.legend(loc="lower left", labelcolor=COLOURS["ink"])
    return chart.svg
