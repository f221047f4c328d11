"""study.json and study.md: each row's scores over the seeds and its paired difference to the row it is against."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from device_bench.evaluate import load_answers
from device_bench.stats import holm, paired_seeds
from pocketvlm.ledger import Ledger
from pocketvlm.study.cells import Cell
from pocketvlm.study.config import Split
from pocketvlm.study.markdown import markdown
from vlm.folders import write_atomic
from vlm.machine import processor

if TYPE_CHECKING:
    from pocketvlm.study.config import Row, StudyConfig
    from pocketvlm.study.reading import Reading

SCHEMA = 1
STEPS, TIME = "steps", "time"
Study = dict[str, Any]  # study.json


@dataclass(frozen=True)
class Comparison:
    """Cells with answers that have `equal` (steps or time) in common, and why others are missing."""

    equal: str
    cells: Sequence[Cell]
    failures: Mapping[Cell, str]

    def of(self, row: str) -> list[Cell]:
        """A row's cells, in the order of seeds."""
        return [cell for cell in self.cells if cell.row == row]


def summarise(
    config: StudyConfig,
    comparisons: Sequence[Comparison],
    tuned: Mapping[str, Mapping[float, float]],
    readings: Sequence[Reading],
    trained: Iterable[Cell],
) -> Study:
    """Put study.json together.

    Args:
        config: the study.
        comparisons: what was trained and evaluated.
        tuned: row -> learning rate factor -> score on validation.
        readings: of the test split; empty for validation.
        trained: everything that was trained, for tuning, too.
    """
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": config.model_dump(mode="json"),
        "split": config.split,
        "readings": [reading.model_dump() for reading in readings],
        "tuning": {row: {str(factor): score for factor, score in scores.items()} for row, scores in tuned.items()},
        "spent": _spent({cell.folder: cell for cell in trained}.values()),
        "comparisons": {found.equal: _rows(config, found) for found in comparisons},
        "pairs": {found.equal: [_pair(config, found, *pair) for pair in config.pairs] for found in comparisons},
    }


def write(result: Study, out: Path) -> None:
    """Write study.json and study.md."""
    write_atomic(out / "study.json", json.dumps(result, indent=1) + "\n")
    write_atomic(out / "study.md", markdown(result))


def _spent(trained: Collection[Cell]) -> dict[str, Any]:
    """Seconds of processors in training, and of one evaluation after the other on the wall."""
    stamps = [
        Ledger(cell.folder).stamp(cell.evaluation(split).products[0].name)
        for cell in trained
        for split in get_args(Split)
    ]
    return {
        "trainings": len(trained),
        "seconds": round(sum(cell.history()["processor_seconds"] for cell in trained)),
        "evaluating_seconds": round(sum(stamp.seconds or 0.0 for stamp in stamps if stamp)),
        "processor": processor(),
    }


def _rows(config: StudyConfig, comparison: Comparison) -> list[dict[str, Any]]:
    rows = [_row(config, comparison, row) for row in config.rows]
    p_values = {row["row"]: row["difference"]["avg"]["p"] for row in rows if row["difference"]}
    adjusted = holm(p_values)
    return [{**row, "p_holm": adjusted.get(row["row"])} for row in rows]


def _row(config: StudyConfig, comparison: Comparison, row: Row) -> dict[str, Any]:
    cells, against = comparison.of(row.name), config.against(row)
    seeds = [_seed(config, cell) for cell in cells]
    families = seeds[0]["scores"] if seeds else {}
    return {
        "row": row.name,
        "against": against,
        "at": row.at,
        "seeds": seeds,
        "mean": {name: statistics.fmean(seed["scores"][name] for seed in seeds) for name in families},
        "std": statistics.stdev(seed["scores"]["avg"] for seed in seeds) if len(seeds) > 1 else None,
        "difference": _difference(config, comparison, row.name, against),
        "failures": {cell.title: why for cell, why in comparison.failures.items() if cell.row == row.name},
    }


def _pair(config: StudyConfig, comparison: Comparison, row: str, against: str) -> dict[str, Any]:
    return {"row": row, "against": against, "difference": _difference(config, comparison, row, against)}


def _difference(config: StudyConfig, comparison: Comparison, row: str, against: str) -> Mapping[str, Any] | None:
    """Paired over the seeds that both rows have."""
    others = {cell.seed: cell for cell in comparison.of(against)}
    paired = [(others[cell.seed], cell) for cell in comparison.of(row) if cell.seed in others]
    if row == against or not paired:
        return None
    return paired_seeds([(_answers(config, first), _answers(config, second)) for first, second in paired])


def _answers(config: StudyConfig, cell: Cell) -> Any:
    return load_answers(cell.answers(config.split) / "answers.jsonl")


def _seed(config: StudyConfig, cell: Cell) -> dict[str, Any]:
    history = cell.history()
    accuracy = json.loads((cell.answers(config.split) / "eval.json").read_text())["accuracy"]
    tasks = {name: task["score"] for name, task in accuracy["tasks"].items()}
    return {
        "seed": cell.seed,
        "scores": {"avg": accuracy["avg"]["score"], **tasks},
        "steps": history["steps"],
        "seconds": history[config.seconds],
        "learning_rates": [stage.learning_rate for stage in cell.config.distill.stages],
        "reports": history["reports"],
        "folder": cell.folder.as_posix(),
    }
