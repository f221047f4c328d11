"""What a study is: a run, the rows in which it is changed, the seeds, and how the rows are made comparable."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pocketvlm.pipeline import RunConfig
from vlm.config import Config, Positive
from vlm.errors import UserError

Seed = Annotated[int, Field(ge=0)]
Split = Literal["validation", "test"]
Changes = dict[str, Any]  # key below `distill`, dotted (stages.1.steps), -> its new value


class Row(Config):
    """One row.

    Attributes:
        name: what table and figure call it.
        base: configuration file that it changes instead of the study's.
        distill: what it changes.
        against: the row before it that it is compared with (None: the first); its own name: it only serves others.
        at: its place in the figure of gains: axis (training steps, ...) -> where there.
    """

    name: str
    base: str | None = None
    distill: Changes = {}
    against: str | None = None
    at: dict[str, float] = {}


class Tuning(Config):
    """Learning rates that every row tries; each keeps the one that is best on validation, on average over `seeds`.

    Attributes:
        factors: of all learning rates of the row.
        seeds: trained for each factor.
    """

    factors: list[Positive] = Field(min_length=2)
    seeds: list[Seed] = Field(min_length=1)


class StudyConfig(Config):
    """A study.

    Attributes:
        name: its folder is runs/<name>.
        base: configuration file of the run that the rows change; its `export` is not used, its `bench` by all rows.
        distill: changes that all rows share.
        rows: what is compared.
        pairs: further comparisons of two rows, (row, against).
        seeds: of weights and data order; all rows of a seed start from the same weights and see the same batches.
        split: scenes that are asked about; `test` is read once (pocketvlm.study.reading).
        scenes: how many; None: as the base.
        equal: what rows have in common: steps, time of training, or both, one comparison after the other.
        clock: what time of training is: on the wall, or of the processors, which other work does not lengthen.
        tuning: learning rates to choose from; None: the rows' own.
        parallel: trainings side by side.
        threads: of each.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str
    distill: Changes = {}
    rows: list[Row] = Field(min_length=1)
    pairs: list[tuple[str, str]] = []
    seeds: list[Seed] = Field(min_length=1)
    split: Split = "validation"
    scenes: Annotated[int, Field(ge=1)] | None = None
    equal: Literal["steps", "time", "both"] = "steps"
    clock: Literal["wall", "processor"] = "wall"
    tuning: Tuning | None = None
    parallel: int = Field(2, ge=1)
    threads: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        folders = [slug(row.name) for row in self.rows]
        for row, folder in zip(self.rows, folders, strict=True):
            if not folder or folders.count(folder) > 1:
                raise ValueError(f"row {row.name!r}: give it a name that differs from the others in a letter or digit")
            known = self.names[: self.names.index(row.name) + 1]
            if row.against is not None and row.against not in known:
                raise ValueError(f"row {row.name!r} is against {row.against!r}, which is no row before it: {known}")
        for name in {name for pair in self.pairs for name in pair} - set(self.names):
            raise ValueError(f"pairs: {name!r} is no row; rows: {self.names}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: the same one twice is no second measurement")
        return self

    @property
    def names(self) -> list[str]:
        """Names of the rows, in order."""
        return [row.name for row in self.rows]

    def against(self, row: Row) -> str:
        """Name of the row that `row` is compared with; its own where it is with none."""
        return row.against or self.rows[0].name

    @property
    def seconds(self) -> str:
        """Entry of history.json that says how long a training took."""
        return "seconds" if self.clock == "wall" else "processor_seconds"

    def reference(self, row: Row) -> Row:
        """The row whose time `row` gets: the one at the end of the chain of rows it is compared with."""
        other = self.rows[self.names.index(self.against(row))]
        return row if other is row else self.reference(other)

    def run_of(self, row: Row, seed: int) -> RunConfig:
        """The run that trains and evaluates one row with one seed.

        Raises:
            UserError: the base or a change is wrong; names the row.
        """
        changes = {**self.distill, **row.distill, "seed": seed, "undistilled": False, "threads": self.threads}
        overrides = [f"distill.{key}={json.dumps(value)}" for key, value in changes.items()]
        bench = {"threads": self.threads, **({"scenes": self.scenes} if self.scenes else {})}
        try:
            asked = RunConfig.load(Path(self.base)).bench.model_dump(mode="json")
            overrides += [f"bench={json.dumps({**asked, **bench})}", f"name={slug(row.name)}-seed-{seed}"]
            return RunConfig.load(Path(row.base or self.base), overrides)
        except UserError as error:
            raise UserError(f"row {row.name!r} of study {self.name!r}: {error}") from error


def slug(name: str) -> str:
    """A row's name as part of a path: "+ reverse KL" -> "reverse-kl"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
