"""The trainings that a study consists of: one cell per row and seed, in each comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketvlm import steps
from pocketvlm.study.config import Split, slug
from vlm.folders import write_atomic

if TYPE_CHECKING:
    from distill.config import Stage
    from pocketvlm.ledger import Step
    from pocketvlm.pipeline import RunConfig
    from pocketvlm.study.config import Row, StudyConfig

STUDENT, CONFIG = "student", "cell.yaml"


@dataclass(frozen=True, eq=False)
class Cell:
    """One training.

    Attributes:
        row: name of the row.
        seed: of weights and data order.
        config: the run of which training and evaluation are done.
        folder: where.
        kind: what it is for, beside the comparison at equal steps.
    """

    row: str
    seed: int
    config: RunConfig
    folder: Path
    kind: str = ""

    @property
    def title(self) -> str:
        """What is shown of it."""
        return ", ".join(part for part in (self.row, f"seed {self.seed}", self.kind) if part)

    def training(self) -> Step:
        """The step that leaves the student."""
        return steps.distill(self.config.distill, self.folder)

    def evaluation(self, split: Split) -> Step:
        """The step that leaves the student's answers."""
        return steps.evaluate(self.config, self.folder, STUDENT, split)

    def prepare(self) -> None:
        """Write the configuration that the cell's processes read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / CONFIG, self.config.dump())

    def history(self) -> dict[str, Any]:
        """What the trainer recorded."""
        content: dict[str, Any] = json.loads((self.folder / STUDENT / "history.json").read_text())
        return content

    def answers(self, split: Split) -> Path:
        """Folder of eval.json and answers.jsonl."""
        path = self.evaluation(split).products[0].path
        assert path is not None  # steps.evaluate names it
        return path


def tuning_cells(study: StudyConfig, out: Path) -> dict[tuple[str, float], list[Cell]]:
    """Row and factor -> the trainings that say how good that learning rate is for that row."""
    if study.tuning is None:
        return {}
    seeds, factors = study.tuning.seeds, study.tuning.factors
    return {
        (row.name, factor): [_at_steps(study, out, row, seed, factor) for seed in seeds]
        for row in study.rows
        for factor in factors
    }


def equal_steps(study: StudyConfig, out: Path, factors: Mapping[str, float]) -> list[Cell]:
    """The comparison in which every row trains for the steps of its configuration.

    Where only equal time is asked for, these are the rows whose time others get, and one seed of each for its time.
    """
    return [
        _at_steps(study, out, row, seed, factors[row.name])
        for row in study.rows
        for seed in study.seeds
        if study.equal != "time" or study.reference(row) is row or seed == study.seeds[0]
    ]


def _at_steps(study: StudyConfig, out: Path, row: Row, seed: int, factor: float) -> Cell:
    """One row's training with one learning rate; found again where tuning and comparison both need it."""
    run = rated(study.run_of(row, seed), factor)
    name, kind = (f"{slug(row.name)}-x{factor}", f"x {factor}") if study.tuning else (slug(row.name), "")
    return Cell(row.name, seed, run, out / "steps" / name / f"seed-{seed}", kind)


def equal_time(study: StudyConfig, out: Path, factors: Mapping[str, float], trained: Iterable[Cell]) -> list[Cell]:
    """The comparison in which every row trains as long as its reference row (the first, as a rule).

    Args:
        study: the study.
        out: its folder.
        factors: row -> learning rate factor.
        trained: the cells of `equal_steps` whose training ended well; the reference rows' are taken over.
    """
    by_place = {(cell.row, cell.seed): cell for cell in trained}
    cells: list[Cell] = []
    for row in study.rows:
        reference = study.reference(row)
        if reference is row:
            cells += [by_place[row.name, seed] for seed in study.seeds if (row.name, seed) in by_place]
            continue
        timed = [by_place.get((name, study.seeds[0])) for name in (row.name, reference.name)]
        seconds: list[float] = [cell.history()[study.seconds] for cell in timed if cell]
        for seed in study.seeds if len(seconds) == 2 else []:
            config = lengthened(rated(study.run_of(row, seed), factors[row.name]), seconds[1] / seconds[0])
            cells.append(Cell(row.name, seed, config, out / "time" / slug(row.name) / f"seed-{seed}", "equal time"))
    return cells


def rated(run: RunConfig, factor: float) -> RunConfig:
    """The same run with every learning rate multiplied."""
    rates = ("learning_rate", "projector_learning_rate")
    return _with_stages(run, lambda stage: {key: rate * factor for key in rates if (rate := getattr(stage, key))})


def lengthened(run: RunConfig, ratio: float) -> RunConfig:
    """The same run with every stage's length multiplied, at least one step each."""

    def longer(stage: Stage) -> dict[str, Any]:
        if stage.steps is not None:
            return {"steps": max(1, round(stage.steps * ratio))}
        assert stage.epochs is not None  # a stage has steps or epochs
        return {"epochs": stage.epochs * ratio}

    return _with_stages(run, longer)


def _with_stages(run: RunConfig, changes: Callable[[Stage], dict[str, Any]]) -> RunConfig:
    stages = [stage.model_copy(update=changes(stage)) for stage in run.distill.stages]
    return run.model_copy(update={"distill": run.distill.model_copy(update={"stages": stages})})
