"""A study from beginning to end: choose learning rates, train, read the answers, compare. What holds is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pocketvlm.study import cells, curves, gains, pool
from pocketvlm.study.reading import Readings, study_hash
from pocketvlm.study.summary import STEPS, TIME, Comparison, Study, summarise, write
from vlm.errors import CheckFailed
from vlm.folders import locked, write_atomic

if TYPE_CHECKING:
    from pocketvlm.ledger import Step
    from pocketvlm.study.cells import Cell
    from pocketvlm.study.config import Split, StudyConfig

SHARED_START = 1e-3  # relative difference of two rows' first cross-entropies that rounding explains


def study(config: StudyConfig, file: Path, out: Path, quiet: bool = False, read_again: bool = False) -> Study:
    """Bring a study up to date.

    Args:
        config: the study.
        file: the file it was read from; the record of the test split's readings lies beside it.
        out: folder in which study.json, study.md and the curves appear.
        quiet: show no progress.
        read_again: let a changed study read the test split.
    Raises:
        UserError: something must be changed first; the test split was read by another study.
        CheckFailed: trainings ended badly; everything that could be compared is written in spite of it.
    """
    out.mkdir(parents=True, exist_ok=True)
    readings, identity = Readings(file), study_hash(config)
    if config.split == "test":
        readings.check(identity, read_again)
    with locked(out / ".lock", wait=False):
        write_atomic(out / "config.yaml", config.dump())
        work = Work(config, quiet)
        tuned = tune(config, out, work.validate)
        rates = factors(config, tuned)
        at_steps = cells.equal_steps(config, out, rates)
        trained = work.train(at_steps)
        comparisons = {STEPS: at_steps} if config.equal != "time" else {}
        if config.equal != "steps":
            comparisons[TIME] = cells.equal_time(config, out, rates, trained)
            trained += work.train([cell for cell in comparisons[TIME] if cell not in at_steps])
        check_shared_start(trained)
        if config.split == "test":
            readings.add(identity, at_steps[0].training().products[0].inputs["code"])
        compared = {cell for group in comparisons.values() for cell in group}
        wanted = [cell for cell in trained if cell in compared]
        answered = set(work.evaluate(config.split, wanted))
        found = [
            Comparison(equal, [cell for cell in group if cell in answered], work.failures)
            for equal, group in comparisons.items()
        ]
        result = summarise(config, found, tuned, readings.all if config.split == "test" else [], work.trained)
        write(result, out)
        for comparison in found:
            write_atomic(out / f"{curves.STEM}-{comparison.equal}.svg", curves.draw(comparison, config.names))
            rows = result["comparisons"][comparison.equal]
            if any(row["at"] for row in rows):
                write_atomic(out / f"{gains.STEM}-{comparison.equal}.svg", gains.draw(rows))
    if work.failures:
        said = "\n".join(f"{cell.title}: {why}" for cell, why in work.failures.items())
        raise CheckFailed(
            f"{len(work.failures)} trainings or evaluations ended badly; {out / 'study.md'} has the others.\n{said}"
        )
    return result


class Work:
    """Does what cells need, side by side; one that failed is left out from then on.

    Attributes:
        failures: cell -> what went wrong.
        trained: what has a student.
    """

    def __init__(self, config: StudyConfig, quiet: bool) -> None:
        self._config, self._quiet = config, quiet
        self.failures: dict[Cell, str] = {}
        self.trained: list[Cell] = []

    def train(self, wanted: list[Cell]) -> list[Cell]:
        """Leave the students of some cells; returns those that have one."""
        trained = self._do("train", wanted, lambda cell: cell.training())
        self.trained += trained
        return trained

    def evaluate(self, split: Split, wanted: list[Cell]) -> list[Cell]:
        """Leave the students' answers; returns the cells that have them."""
        return self._do(split, wanted, lambda cell: cell.evaluation(split))

    def validate(self, wanted: list[Cell]) -> list[Cell]:
        """Train, and answer the validation split."""
        return self.evaluate("validation", self.train(wanted))

    def _do(self, task: str, wanted: list[Cell], step_of: Callable[[Cell], Step]) -> list[Cell]:
        able = [cell for cell in wanted if cell not in self.failures]
        jobs = pool.pending(able, task, step_of)
        self.failures |= pool.run(jobs, self._config.parallel, self._config.threads, self._quiet)
        return [cell for cell in able if cell not in self.failures]


Tuned = Mapping[str, Mapping[float, float]]  # row -> factor -> mean score on validation


def tune(config: StudyConfig, out: Path, validate: Callable[[list[Cell]], list[Cell]]) -> Tuned:
    """Score every row with every learning rate on validation; a factor one of whose trainings failed has no score."""
    wanted = cells.tuning_cells(config, out)
    done = set(validate([cell for group in wanted.values() for cell in group]))
    scores: dict[str, dict[float, float]] = {}
    for (row, factor), group in wanted.items():
        if all(cell in done for cell in group):
            values = [_average(cell.answers("validation")) for cell in group]
            scores.setdefault(row, {})[factor] = sum(values) / len(values)
    return scores


def factors(config: StudyConfig, tuned: Tuned) -> dict[str, float]:
    """Row -> the learning rate factor with the best score; 1 for a row that was not tuned."""
    scores = {name: tuned.get(name, {1.0: 0.0}) for name in config.names}
    return {name: max(found, key=lambda factor: found[factor]) for name, found in scores.items()}


def check_shared_start(trained: list[Cell]) -> None:
    """See that rows with the same student and data really began with the same weights and the same batch.

    Raises:
        CheckFailed: the first cross-entropies of two rows of a seed differ.
    """
    first: dict[str, tuple[Cell, float]] = {}
    for cell in trained:
        run = cell.config.distill
        same = run.model_dump(mode="json", include={"student", "teacher", "vision", "precision"})
        data = [(stage.data.model_dump(mode="json"), stage.batch_size) for stage in run.stages]
        key = json.dumps([cell.seed, same, data])
        value = cell.history()["rows"][0]["terms"]["sup"]["value"]
        other, expected = first.setdefault(key, (cell, value))
        if abs(value - expected) > SHARED_START * abs(expected):
            raise CheckFailed(
                f"seed {cell.seed}: the first cross-entropy of row {cell.row!r} is {value}, that of {other.row!r} "
                f"{expected}: they did not start from the same weights and batch, so they cannot be compared in pairs."
            )


def _average(folder: Path) -> float:
    return float(json.loads((folder / "eval.json").read_text())["accuracy"]["avg"]["score"])
