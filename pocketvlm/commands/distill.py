"""`pocketvlm distill`: a teacher and a student become a distilled student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distill.config import DistillConfig


def distill(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file: a distillation, or a run with a `distill` section.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Changes to it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder in which student/ appears, instead of runs/<name>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Distil a student; a killed distillation goes on from its last checkpoint."""
    from pocketvlm.console import print_json
    from pocketvlm.ledger import Ledger
    from pocketvlm.pipeline import advance
    from pocketvlm.progress import Progress
    from pocketvlm.steps import distill as distill_step
    from vlm.errors import CheckFailed
    from vlm.folders import locked

    settings, name = load(config, overrides)
    run_dir = out or Path("runs") / name
    failures: dict[str, str] = {}
    with locked(run_dir / ".lock", wait=False), Progress(quiet=as_json) as progress:
        ledger, step = Ledger(run_dir), distill_step(settings, run_dir)
        if any(ledger.why(product) for product in step.products):
            progress.start({step.title: ledger.expected_s(step)})
        outcome = advance(ledger, step, failures, progress)
        progress.end(outcome)
    if failures:
        raise CheckFailed(failures["student"])
    student = run_dir / "student"
    reports: list[str] = json.loads((student / "history.json").read_text())["reports"]
    if as_json:
        tree = {"checkpoint": student, "state": outcome.state, "seconds": outcome.seconds, "reports": reports}
        print_json(tree)
    else:
        print(*(f"note: {sentence}" for sentence in reports), f"Student: {student}", sep="\n")


def load(path: Path, overrides: list[str] | None) -> tuple[DistillConfig, str]:
    """Read a distillation and its name from its own file (the file's name) or from a run's."""
    from distill.config import DistillConfig
    from pocketvlm.pipeline import RunConfig
    from vlm.config import read

    if "stages" in read(path):
        return DistillConfig.load(path, overrides), path.stem
    settings = RunConfig.load(path, overrides)
    return settings.distill, settings.name
