"""The distillation stage: train the student, and beside it the same student without a teacher, in worker processes."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue

from distill.config import DistillConfig
from vlm.errors import UserError

Progress = Callable[[float, str], None]


def run(config: DistillConfig, run_dir: Path, on_progress: Progress | None = None) -> Path:
    """Train what is missing of `run_dir`/student and `run_dir`/undistilled; interrupted training goes on.

    Args:
        config: the run.
        run_dir: folder of the run; the finished folders appear in it.
        on_progress: called with the share of all steps done and a message.
    Returns:
        The student's folder.
    Raises:
        UserError: a training process ended badly; names its log.
    """
    variants = {"student": config}
    if config.undistilled:
        variants["undistilled"] = config.without_distillation()
    missing = {name: variant for name, variant in variants.items() if not (run_dir / name).is_dir()}
    lines: Queue[tuple[str, str | None]] = Queue()
    workers = {name: _start(variant, run_dir, name, lines) for name, variant in missing.items()}
    try:
        _watch(lines, list(workers), on_progress)
        for name, worker in workers.items():
            if worker.wait() != 0:
                log = run_dir / f"{name}.log"
                raise UserError(
                    f"{run_dir / name}: training ended with code {worker.returncode}.\n{_tail(log)}Log: {log}"
                )
    finally:
        for worker in workers.values():
            worker.kill()
    return run_dir / "student"


def _start(
    config: DistillConfig, run_dir: Path, name: str, lines: Queue[tuple[str, str | None]]
) -> subprocess.Popen[str]:
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / f"{name}.yaml"
    file.write_text(config.dump())
    # stdin stays open as long as this process lives: a worker whose parent died sees its end and stops.
    with (run_dir / f"{name}.log").open("a") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "distill.worker", str(file), str(run_dir / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    threading.Thread(target=_forward, args=(name, worker, lines), daemon=True).start()
    return worker


def _forward(name: str, worker: subprocess.Popen[str], lines: Queue[tuple[str, str | None]]) -> None:
    for line in worker.stdout or []:
        lines.put((name, line))
    lines.put((name, None))


def _watch(lines: Queue[tuple[str, str | None]], names: list[str], on_progress: Progress | None) -> None:
    """Forward progress until every worker has closed its output."""
    shares, running = dict.fromkeys(names, 0.0), set(names)
    while running:
        name, line = lines.get()
        if line is None:
            running.discard(name)
            continue
        if not line.startswith("{"):
            continue
        event = json.loads(line)
        shares[name] = event["step"] / event["steps"]
        if on_progress:
            on_progress(
                sum(shares.values()) / len(shares), f"{name}: {event['stage']} {event['step']}/{event['steps']}"
            )


def _tail(log: Path, lines: int = 3) -> str:
    found = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-lines:]
    return "".join(f"  {line}\n" for line in found)
