"""`pocketvlm report`: report.json, report.md and index.html of a run."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Folders of runs (runs/<name>) or of `pocketvlm bench`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print where the report is as JSON.")] = False,
) -> None:
    """Draw the report of what was distilled, exported and measured."""
    from device_bench.report import write
    from pocketvlm.console import print_json

    write(results, out)
    if as_json:
        print_json({"report": out / "report.json", "page": out / "index.html", "markdown": out / "report.md"})
    else:
        print(f"Report: {out / 'index.html'}")
