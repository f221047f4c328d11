"""Cells side by side, each in a process of its own; what is finished is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from queue import Queue
from typing import Any

from pocketvlm.ledger import Ledger, Step
from pocketvlm.pipeline import Outcome
from pocketvlm.progress import Progress
from pocketvlm.study.cells import Cell

JOB, LOG = "pocketvlm.study.job", "job.log"
_TAIL = 3  # lines of the log that an error shows
Event = tuple["Job", dict[str, Any] | None]  # None: the process closed its output


@dataclass(frozen=True, eq=False)
class Job:
    """One task of one cell (pocketvlm.study.job), and why it must be done."""

    cell: Cell
    task: str
    why: str
    expected_s: float


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
    events: Queue[Event] = Queue()
    with Progress(quiet) as progress:
        progress.start({job.cell.title: job.expected_s / parallel for job in jobs})
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.popleft()
                    progress.begin(job.cell.title, job.why)
                    begun[job] = time.monotonic()
                    running[job] = _start(job, threads, events)
                job, event = events.get()
                if event is None:
                    code = running.pop(job).wait()
                    if code and job.cell not in failures:
                        failures[job.cell] = f"ended with code {code}.\n{_tail(job)}Log: {job.cell.folder / LOG}"
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


def _start(job: Job, threads: int, events: Queue[Event]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", JOB, str(job.cell.folder), job.task]
    with (job.cell.folder / LOG).open("a") as log:
        # Standard input stays open as long as this process lives; the job sees its end and stops.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    threading.Thread(target=_forward, args=(job, process, events), daemon=True).start()
    return process


def _forward(job: Job, process: subprocess.Popen[str], events: Queue[Event]) -> None:
    for line in process.stdout or []:
        if line.startswith("{"):
            events.put((job, json.loads(line)))
    events.put((job, None))


def _tail(job: Job) -> str:
    lines = (job.cell.folder / LOG).read_text(errors="replace").splitlines()
    return "".join(f"  {line}\n" for line in [line for line in lines if line.strip()][-_TAIL:])
