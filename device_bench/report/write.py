"""Writes the three files of a report."""

import json
from collections.abc import Sequence
from pathlib import Path

from device_bench.report.build import build
from device_bench.report.markdown import markdown
from device_bench.report.page import page
from device_bench.report.sources import Tree, read_json, run_names
from vlm.folders import write_atomic


def write(runs: Path | Sequence[Path], out: Path) -> Path:
    """Build the report of one or several runs and draw it.

    Args:
        runs: as `build` takes them.
        out: folder for report.json, report.md and index.html; nothing else in it is touched.
    Returns:
        `out`.
    Raises:
        UserError: as `build` does.
    """
    folders = [runs] if isinstance(runs, Path) else list(runs)
    report = build(folders)
    drawn = page(report, raw_samples(report, folders))
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_atomic(out / "report.md", markdown(report))
    write_atomic(out / "index.html", drawn)
    return out


def raw_samples(report: Tree, folders: Sequence[Path]) -> dict[tuple[str, str], Tree]:
    """The raw latency samples that the report's benches point to, by run and file."""
    roots = {name: folder for folder, name in run_names(folders).items()}
    found = {}
    for artifact in report["artifacts"]:
        for bench in artifact["benches"]:
            if bench["samples"] and (samples := read_json(roots[artifact["run"]] / bench["samples"])):
                found[artifact["run"], bench["samples"]] = samples
    return found
