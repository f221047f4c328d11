"""`pocketvlm report`: report.json, report.md and index.html of a run."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Folders of runs (runs/<name>) or of `pocketvlm bench`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    baseline: Annotated[Path | None, typer.Option(help="Also write the part that `pocketvlm gate` needs here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print where the report is as JSON.")] = False,
) -> None:
    """Draw the report of what was distilled, exported and measured."""
    import json

    from device_bench.gate import read_report, slim
    from device_bench.report import write
    from pocketvlm.console import print_json
    from vlm.folders import write_atomic

    write(results, out)
    if baseline:
        baseline.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(baseline, json.dumps(slim(read_report(out)[0]), indent=1) + "\n")
    if as_json:
        print_json({"report": out / "report.json", "page": out / "index.html", "markdown": out / "report.md"})
    else:
        print(f"Report: {out / 'index.html'}")
