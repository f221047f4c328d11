"""The whole road in one call: distil, export, measure, check, report; what still holds is skipped and said so."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from device_bench.config import BenchConfig
from distill.config import DistillConfig
from export.config import ExportConfig
from pocketvlm import accuracy
from pocketvlm.console import output_to
from pocketvlm.ledger import Ledger, Step
from pocketvlm.progress import Progress
from pocketvlm.steps import road
from vlm.config import Config
from vlm.errors import CheckFailed
from vlm.folders import locked, write_atomic


class RunConfig(Config):
    """One run: a name and one section per stage.

    Attributes:
        name: of the run; its folder is runs/<name>.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    distill: DistillConfig
    export: ExportConfig = ExportConfig()
    bench: BenchConfig = BenchConfig()


@dataclass(frozen=True)
class Outcome:
    """What became of one step: `state` is built, up to date, failed or left out; `why` says the reason."""

    step: str
    state: str
    why: str
    seconds: float | None


def run(config: RunConfig, run_dir: Path, progress: Progress) -> tuple[list[Outcome], list[str]]:
    """Bring a run folder up to date.

    Args:
        config: the run.
        run_dir: its folder; made if need be.
        progress: told what happens.
    Returns:
        One outcome per step, and what failed its check (parity, a measurement, accuracy); everything that could be
        made in spite of it is there, the report included.
    Raises:
        UserError: another run works in the folder, an input is missing, or a stage needs something changed.
    """
    with locked(run_dir / ".lock", wait=False):
        write_atomic(run_dir / "config.yaml", config.dump())
        ledger = Ledger(run_dir)
        steps = road(config, run_dir)
        pending = ledger.pending(steps)
        if "student" in pending:
            refuse_targets(config, ledger.stages / "targets.log")
        progress.start({s.title: ledger.expected_s(s) for s in steps if any(p.name in pending for p in s.products)})
        outcomes: list[Outcome] = []
        failures: dict[str, str] = {}  # product -> what failed
        for step in steps:
            outcome = advance(ledger, step, failures, progress)
            progress.end(outcome)
            outcomes.append(outcome)
        return outcomes, [*dict.fromkeys(failures.values()), *accuracy.problems(run_dir / "stages" / "accuracy.json")]


def refuse_targets(config: RunConfig, log: Path) -> None:
    """See before a training that every target can be exported: its precision, and the libraries of its format.

    Raises:
        UserError: one cannot.
    """
    with output_to(log):
        from export.run import parse_target

        for target in config.export.targets:
            parse_target(target)


def advance(ledger: Ledger, step: Step, failures: dict[str, str], progress: Progress) -> Outcome:
    """Make one step's products if they do not hold; a failed check is noted in `failures` and keeps others going."""
    needs = [name for product in step.products for name in product.needs]
    if (blocked := [name for name in needs if name in failures]) and not step.tolerant:
        for product in step.products:
            ledger.discard(product)
            failures[product.name] = failures[blocked[0]]
        return Outcome(step.title, "left out", f"{blocked[0]} failed", None)
    reasons = [reason for product in step.products if (reason := ledger.why(product))]
    if not reasons:
        return Outcome(step.title, "up to date", "", None)
    progress.begin(step.title, reasons[0])
    start = time.monotonic()
    try:
        with output_to(ledger.stages / f"{step.products[0].name}.log"):
            seconds = ledger.build(step, progress.update)
    except CheckFailed as failure:
        failures.update({product.name: str(failure) for product in step.products})
        return Outcome(step.title, "failed", str(failure).splitlines()[0], round(time.monotonic() - start, 2))
    return Outcome(step.title, "built", reasons[0], seconds)
