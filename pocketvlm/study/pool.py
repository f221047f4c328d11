"""Cells side by side, each in a process of its own; what is finished is not done again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from pocketvlm.ledger import Ledger, Step
from pocketvlm.pipeline import Outcome
from pocketvlm.progress import Progress
from pocketvlm.study.cells import Cell
from vlm.children import Event, start, tail

JOB = "pocketvlm.study.job"


@dataclass(frozen=True, eq=False)
class Job:
    """One task of one cell (pocketvlm.study.job), and why it must be done."""

    cell: Cell
    task: str
    why: str
    expected_s: float

    @property
    def log(self) -> Path:
        """What its process printed."""
        return self.cell.folder / "job.log"


def pending(cells: Iterable[Cell], task: str, step_of: Callable[[Cell], Step]) -> list[Job]:
    """The cells for which a step must be done, and their configurations written where their processes find them.

    Args:
        cells: all that need it.
        task: what pocketvlm.study.job calls it.
        step_of: the step.
    """
    jobs = []
    for cell in cells:
        ledger, step = Ledger(cell.folder), step_of(cell)
        why = next((reason for product in step.products if (reason := ledger.why(product))), None)
        if why:
            cell.prepare()
            jobs.append(Job(cell, task, why, ledger.expected_s(step)))
    return jobs


def run(jobs: list[Job], parallel: int, threads: int, quiet: bool) -> dict[Cell, str]:
    """Do all jobs, `parallel` at a time, and go on when one fails.

    Returns:
        Cell -> what went wrong.
    """
    waiting, running, failures = deque(jobs), dict[Job, subprocess.Popen[str]](), dict[Cell, str]()
    begun: dict[Job, float] = {}
    events: Queue[tuple[Job, Event | None]] = Queue()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with Progress(quiet) as progress:
        progress.start({job.cell.title: job.expected_s / parallel for job in jobs})
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.popleft()
                    progress.begin(job.cell.title, job.why)
                    begun[job] = time.monotonic()
                    command = [sys.executable, "-m", JOB, str(job.cell.folder), job.task]
                    running[job] = start(job, command, job.log, environment, events)
                job, event = events.get()
                if event is None:
                    code = running.pop(job).wait()
                    if code and job.cell not in failures:
                        failures[job.cell] = f"ended with code {code}.\n{tail(job.log)}Log: {job.log}"
                    progress.end(_outcome(job, time.monotonic() - begun[job], failures.get(job.cell)))
                elif "failed" in event:
                    failures[job.cell] = event["failed"]
                else:
                    progress.update(event["fraction"], f"{job.cell.title}: {event['message']}")
        finally:
            for process in running.values():
                process.kill()
    return failures


def _outcome(job: Job, seconds: float, failure: str | None) -> Outcome:
    if failure:
        return Outcome(job.cell.title, "failed", failure.splitlines()[0], seconds)
    return Outcome(job.cell.title, "built", job.why, seconds)
