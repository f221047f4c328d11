"""`pocketvlm distill`: a teacher and a student become a distilled student."""

from pathlib import Path
from typing import Annotated

import typer


def distill(
    config: Annotated[Path, typer.Argument(help="YAML file of a run; its `distill` section is used.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to it, for example distill.seed=1.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run instead of runs/<name>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Distil the student of a run; a killed distillation goes on from its last checkpoint."""
    from pocketvlm.console import print_json
    from pocketvlm.ledger import Ledger
    from pocketvlm.pipeline import RunConfig, advance, locked
    from pocketvlm.progress import Progress
    from pocketvlm.steps import distill as distill_step
    from vlm.errors import CheckFailed

    settings = RunConfig.load(config, overrides)
    run_dir = out or Path("runs") / settings.name
    with locked(run_dir), Progress(quiet=as_json) as progress:
        ledger, step = Ledger(run_dir), distill_step(settings, run_dir)
        if any(ledger.why(product) for product in step.products):
            progress.start({step.title: ledger.expected_s(step)})
        failures: dict[str, str] = {}
        outcome = advance(ledger, step, failures, progress)
        progress.end(outcome)
    if failures:
        raise CheckFailed(failures["student"])
    if as_json:
        print_json({"checkpoint": run_dir / "student", "state": outcome.state, "seconds": outcome.seconds})
    else:
        print(f"Student: {run_dir / 'student'}")
