"""The test split is read once: a file beside the study's says which study read it, and a changed one is refused.

Whoever looks at the test scores, changes something and looks again, chooses on the test split; its intervals then mean
nothing. The record lies beside the study file, not in runs/, so that it outlives `make clean` and can be committed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from pydantic import ValidationError

from pocketvlm.stamps import input_files, text_hash
from pocketvlm.steps import named_paths
from pocketvlm.study.config import StudyConfig
from vlm.config import Config
from vlm.errors import UserError
from vlm.folders import write_atomic


class Reading(Config):
    """One reading of the test split.

    Attributes:
        study: hash of everything that was compared: rows, seeds, models, data, questions.
        code: hash of the sources that train.
        at: ISO time.
        forced: it was not the first, and the user said so.
    """

    study: str
    code: str
    at: str
    forced: bool


class Readings:
    """The record of one study file.

    Args:
        file: the study's YAML file; the record is <file without .yaml>.test-read.json.
    """

    def __init__(self, file: Path) -> None:
        self.file = file.with_suffix(".test-read.json")
        self.all = self._load()

    def check(self, study: str, forced: bool) -> None:
        """See whether a study may read the test split.

        Raises:
            UserError: another one did.
        """
        if not self.all or forced or any(reading.study == study for reading in self.all):
            return
        raise UserError(
            f"{self.file}: the test split was read at {self.all[0].at}, for this study as it was then; it has changed "
            "since (rows, seeds, models, data or questions). Choose on validation (split=validation). If the test "
            "split shall be read again, type --read-test-again; the table then says so."
        )

    def add(self, study: str, code: str) -> None:
        """Record that the test split is read now, unless the same study and code did before."""
        if any((reading.study, reading.code) == (study, code) for reading in self.all):
            return
        forced = bool(self.all) and all(reading.study != study for reading in self.all)
        reading = Reading(study=study, code=code, at=time.strftime("%Y-%m-%dT%H:%M:%S%z"), forced=forced)
        self.all.append(reading)
        tree = [reading.model_dump() for reading in self.all]
        write_atomic(self.file, json.dumps(tree, indent=1) + "\n")

    def _load(self) -> list[Reading]:
        if not self.file.is_file():
            return []
        try:
            return [Reading.model_validate(reading) for reading in json.loads(self.file.read_text())]
        except (ValueError, ValidationError) as error:
            raise UserError(
                f"{self.file}: not a record of readings ({error}). Restore it: it says who read the test split."
            ) from error


def study_hash(study: StudyConfig) -> str:
    """Hash what a study compares; its name, its folder and how many trainings run side by side do not matter."""
    runs = [study.run_of(row, seed) for row in study.rows for seed in study.seeds]
    compared = [[row.name, study.against(row)] for row in study.rows] + [list(pair) for pair in study.pairs]
    questions = runs[0].bench.model_dump(mode="json", include={"tasks", "scenes", "max_new_tokens"})
    clock = {"clock"} if study.equal != "steps" else set()
    how = study.model_dump(mode="json", include={"seeds", "equal", "tuning"} | clock)
    files = [input_files(named_paths(run.distill)) for run in runs[:: len(study.seeds)]]
    configs = [run.distill.model_dump(mode="json", exclude={"threads"}) for run in runs]
    return text_hash([compared, questions, how, files, configs])
