"""`pocketvlm run`: the whole road."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, for example configs/tiny.yaml.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Changes to it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run instead of runs/<name>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Distil, export, measure and report; whatever still holds is skipped, a killed run goes on where it stood."""
    import time

    from pocketvlm.console import print_json, print_table
    from pocketvlm.pipeline import RunConfig
    from pocketvlm.pipeline import run as run_road
    from pocketvlm.progress import Progress, span
    from vlm.errors import CheckFailed

    start = time.monotonic()
    settings = RunConfig.load(config, overrides)
    run_dir = out or Path("runs") / settings.name
    with Progress(quiet=as_json) as progress:
        outcomes, problems = run_road(settings, run_dir, progress)
    seconds = round(time.monotonic() - start, 2)
    page = run_dir / "report" / "index.html"
    if as_json:
        steps = [vars(outcome) for outcome in outcomes]
        print_json({"run": run_dir, "report": page, "seconds": seconds, "problems": problems, "steps": steps})
    else:
        rows = [[o.step, o.state, "" if o.seconds is None else span(o.seconds), o.why] for o in outcomes]
        print_table("", ["step", "state", "time", "because"], rows)
        print(f"{span(seconds)} in all. Report: {page}")
    if problems:
        raise CheckFailed("\n".join(problems))
