"""`pocketvlm doctor`: what is missing and what to type."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file of a run to judge this machine by.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Changes to it.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="A phone or board to look at: adb[:SERIAL] or ssh:USER@HOST[:PORT].")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder, instead of runs/<name>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Say what is installed, which devices answer, what a run will need, and what to do about each problem."""
    from pocketvlm.console import USER_ERROR, print_json, print_table
    from pocketvlm.doctor import examine

    findings = examine(config, device or [], overrides, out)
    broken = [finding for finding in findings if finding.state == "missing"]
    if as_json:
        print_json({"ready": not broken, "findings": [vars(finding) for finding in findings]})
    else:
        rows = [[f.topic, f.name, f.state, f.found, f.advice] for f in findings]
        print_table("", ["", "what", "state", "found", "what to do"], rows)
        print(f"Keeps this from running: {', '.join(f.name for f in broken)}." if broken else "Ready.")
    if broken:
        raise typer.Exit(USER_ERROR)
