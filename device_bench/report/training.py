"""The loss curves of a run, thinned to what a chart can show."""

from collections.abc import Sequence
from pathlib import Path

from device_bench.report.sources import Tree, read_json

MOST_ROWS = 240


def training_record(run: Path) -> Tree:
    """History of the student and of the undistilled one; None with a reason where there is none."""
    record: Tree = {name: _history(run / name / "history.json") for name in ("student", "undistilled")}
    reasons = {name: f"{name}/history.json is missing" for name in record if record[name] is None}
    return {**record, "reasons": reasons}


def _history(path: Path) -> Tree | None:
    history = read_json(path)
    if history is None:
        return None
    rows = history.get("rows", [])
    kept = thin(rows)
    return {**history, "rows": kept, "rows_total": len(rows), "rows_kept": len(kept)}


def thin(rows: list[Tree], most: int = MOST_ROWS) -> list[Tree]:
    """Keep every n-th row, those with a gradient norm, and the first and last of each stage; nothing is averaged."""
    if len(rows) <= most:
        return rows
    probed = [
        i for i, row in enumerate(rows) if any(term.get("grad_norm") is not None for term in row["terms"].values())
    ]
    edges = [i for i in range(1, len(rows)) if rows[i]["stage"] != rows[i - 1]["stage"]]
    keep = {
        *_spaced(range(len(rows)), most),
        *_spaced(probed, most),
        *edges,
        *(edge - 1 for edge in edges),
        len(rows) - 1,
    }
    return [rows[i] for i in sorted(keep)]


def _spaced(positions: Sequence[int], most: int) -> Sequence[int]:
    return positions[:: max(1, -(-len(positions) // most))]
