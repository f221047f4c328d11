"""The distillation stage: train the student, and beside it the same student without a teacher, in worker processes."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from queue import Queue

from distill.config import DistillConfig
from distill.training.launch import FAILURE, command, environment
from vlm.children import Event, start, tail
from vlm.errors import CheckFailed, UserError
from vlm.models.prepared import prepared

Progress = Callable[[float, str], None]
Events = Queue[tuple[str, Event | None]]


def run(config: DistillConfig, run_dir: Path, on_progress: Progress | None = None) -> Path:
    """Train what is missing of `run_dir`/student and `run_dir`/undistilled; interrupted training goes on.

    Args:
        config: the run.
        run_dir: folder of the run; the finished folders appear in it.
        on_progress: called with the share of all steps done and a message.
    Returns:
        The student's folder.
    Raises:
        UserError: a checkpoint is not there; a training process ended badly: says why, and names its log.
        CheckFailed: a term of the loss does nothing or collapsed.
    """
    _prepare(config, on_progress or (lambda share, what: None))
    variants = {"student": config}
    if config.undistilled:
        variants["undistilled"] = config.without_distillation()
    missing = {name: variant for name, variant in variants.items() if not (run_dir / name).is_dir()}
    # Students of sizes are small and share a machine; one from a checkpoint, or on several processes, wants it alone.
    alone = isinstance(config.student, str) or config.processes > 1
    for group in [{name: missing[name]} for name in missing] if alone else [missing]:
        _train(group, run_dir, on_progress)
    return run_dir / "student"


def _prepare(config: DistillConfig, on_progress: Progress) -> None:
    """Fetch and convert the checkpoints once, before several processes ask for them, and where it can be shown."""
    named = (config.teacher, config.vision, config.student)
    for name in dict.fromkeys(name for name in named if isinstance(name, str)):

        def show(share: float, what: str, name: str = name) -> None:
            on_progress(0.0, f"converting {name}: {share:.0%}")

        prepared(Path(name), show)


def _train(variants: dict[str, DistillConfig], run_dir: Path, on_progress: Progress | None) -> None:
    """Train some variants side by side."""
    events: Events = Queue()
    workers = {name: _start(variant, run_dir, name, events) for name, variant in variants.items()}
    try:
        _watch(events, list(workers), on_progress)
        for name, worker in workers.items():
            if worker.wait() != 0:
                raise _failure(run_dir, name, worker.returncode)
    finally:
        for worker in workers.values():
            worker.terminate()  # a launcher passes this on to its processes


def _start(config: DistillConfig, run_dir: Path, name: str, events: Events) -> subprocess.Popen[str]:
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / f"{name}.yaml"
    file.write_text(config.dump())
    (run_dir / f"{name}{FAILURE}").unlink(missing_ok=True)
    return start(name, command(config, file, run_dir / name), run_dir / f"{name}.log", environment(config), events)


def _watch(events: Events, names: list[str], on_progress: Progress | None) -> None:
    """Forward progress until every worker has closed its output, or one has failed."""
    shares, running = dict.fromkeys(names, 0.0), set(names)
    while running:
        name, event = events.get()
        if event is None:
            running.discard(name)
            continue
        if "prepared" not in event:
            shares[name] = event["step"] / event["steps"]
        if on_progress:
            on_progress(
                sum(shares.values()) / len(shares), f"{name}: {event['stage']} {event['step']}/{event['steps']}"
            )


def _failure(run_dir: Path, name: str, code: int) -> Exception:
    """What a worker that ended badly says of it, or what its exit code and its log say."""
    log, said = run_dir / f"{name}.log", run_dir / f"{name}{FAILURE}"
    if said.is_file():
        failure = json.loads(said.read_text())
        return (CheckFailed if failure["check"] else UserError)(failure["message"])
    text = log.read_text(errors="replace")
    # A launcher ends with 1 and says in its log how the first process that failed ended.
    told = [int(value) for value in re.findall(r"(?:failed \(exitcode: |return code = )(-?\d+)", text)]
    number = max(0, -next(iter(told), code))
    again = "Run the command again: it goes on from the last checkpoint."
    if number == signal.SIGKILL:
        return UserError(
            f"{run_dir / name}: a training process was killed (signal 9). If nobody did that, the machine ran out of "
            "memory and the kernel ended it (`dmesg` says so): give it a smaller stages[].batch_size, more "
            f"gradient_accumulation, or gradient_checkpointing. {again}\nLog: {log}"
        )
    if number:
        return UserError(
            f"{run_dir / name}: a training process was ended by signal {number} ({signal.Signals(number).name}). "
            f"{again}\n{tail(log)}Log: {log}"
        )
    return UserError(f"{run_dir / name}: training ended with code {code}.\n{tail(log)}Log: {log}")
