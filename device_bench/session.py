"""A long evaluation: it goes on where it was killed, and several processes share its images.

Every answer is one line of a journal as soon as its image or batch is done. An answer depends on its question alone
(greedy, one sequence at a time), or on its batch, whose composition is fixed by the questions; so the records are the
same whatever was interrupted and however many processes answered.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from device_bench.evaluate import evaluate, evaluate_batch, load_answers
from device_bench.tasks.base import BenchQuestion, Sample
from vlm.errors import CheckFailed, UserError
from vlm.folders import sha256, write_atomic
from vlm.manifest import MANIFEST
from vlm.runtimes import open_runtime

Progress = Callable[[int, int], None]
POLL_S = 0.5
DEVICE_FILES = Path("/dev")


class Unit(list[BenchQuestion]):
    """Questions that one process answers; `together` says whether in one batch."""

    def __init__(self, questions: Sequence[BenchQuestion], together: bool = False) -> None:
        super().__init__(questions)
        self.together = together


@dataclass(frozen=True)
class Team:
    """Processes that were started together: this one's place among them, how many, and waiting for all of them."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Session:
    """What is asked of which model.

    Attributes:
        model: folder of an artifact or a checkpoint.
        questions: all of them, in the order of the records.
        header: what the answers depend on; answers of another header are not mixed with these.
        journal: folder in which the answers gather until all are there.
        max_new_tokens: longest answer.
        threads: CPU threads of each process.
        processes: how many share the images; process k sees only GPU k modulo their number.
        batch: questions that the torch engine answers at once.
        team: processes that run the same session and share its images.
    """

    model: Path
    questions: Sequence[BenchQuestion]
    header: dict[str, Any]
    journal: Path
    max_new_tokens: int
    threads: int = 2
    processes: int = 1
    batch: int = 1
    team: Team = Team()

    def run(self, on_progress: Progress) -> list[Sample]:
        """Ask what is not answered yet.

        Returns:
            One sample per question, in their order; nothing where another process of the team writes them.
        Raises:
            UserError: the journal is of another evaluation, or the model or a picture is unusable.
            CheckFailed: a process crashed; what it has answered is kept.
        """
        team = self.team
        if team.size > 1 and self.processes > 1:
            raise UserError(
                f"--processes {self.processes} under accelerate launch, which started {team.size}. One of both."
            )
        left = self._left()
        before = len(self.questions) - sum(map(len, left))

        def report(answered: int) -> None:
            on_progress(min(before + answered * team.size, len(self.questions)), len(self.questions))

        report(0)
        count = max(team.size, self.processes)
        shards = [left[k::count] for k in range(count)]
        if self.processes > 1:
            self._spawn([shard for shard in shards if shard], report)
        elif own := shards[team.rank]:
            answer_shard(self.model, own, self.max_new_tokens, self.threads, self._part(team.rank + 1), report)
        team.wait()
        if team.rank > 0:
            return []
        found = self._read()
        return [found[question.family, question.id] for question in self.questions]

    def _left(self) -> list[Unit]:
        """What is not answered yet; the first process tidies the journal before the others read it."""
        done = self._resume() if self.team.rank == 0 else {}
        self.team.wait()
        done = done or self._read()
        self.team.wait()  # nobody writes before everybody has read
        asked = units(self.questions, self.batch)
        return [unit for unit in asked if any((question.family, question.id) not in done for question in unit)]

    def clear(self) -> None:
        """Remove the journal, once the records are written."""
        for path in self.journal.glob("*"):
            path.unlink()
        self.journal.rmdir()

    def _part(self, number: int) -> Path:
        return self.journal / f"{number}.jsonl"

    def _resume(self) -> dict[tuple[str, str], Sample]:
        self.journal.mkdir(parents=True, exist_ok=True)
        file, header = self.journal / "header.json", json.dumps(self.header, sort_keys=True, indent=1)
        if file.is_file() and file.read_text() != header:
            raise UserError(
                f"{self.journal}: holds answers of another evaluation (other model, questions or settings, see "
                f"{file.name} in it). Remove it, or choose another --out."
            )
        write_atomic(file, header)
        done = self._read()
        lines = "".join(json.dumps(vars(sample), ensure_ascii=False) + "\n" for sample in done.values())
        write_atomic(self._part(0), lines)
        for path in self.journal.glob("*.jsonl"):
            if path != self._part(0):
                path.unlink()
        return done

    def _read(self) -> dict[tuple[str, str], Sample]:
        """Every whole line of every part; the last line of a killed process may be cut."""
        found: dict[tuple[str, str], Sample] = {}
        for path in sorted(self.journal.glob("*.jsonl")):
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n"):
                write_atomic(path, text[: text.rfind("\n") + 1])
            found |= {(sample.family, sample.id): sample for sample in load_answers(path)}
        return found

    def _spawn(self, shards: Sequence[Sequence[Unit]], report: Callable[[int], None]) -> None:
        context = multiprocessing.get_context("spawn")
        errors, counts, workers = context.SimpleQueue(), [], []
        for number, shard in enumerate(shards, 1):
            counts.append(context.Value("i", 0))
            job = (self.model, shard, self.max_new_tokens, self.threads, self._part(number), number - 1)
            workers.append(context.Process(target=_worker, args=(*job, counts[-1], errors), daemon=True))
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
                next(worker for worker in workers if worker.is_alive()).join(POLL_S)
                report(sum(count.value for count in counts))
        finally:
            _stop(workers)
        if not errors.empty():
            raise UserError(errors.get())
        if broken := [worker.exitcode for worker in workers if worker.exitcode]:
            raise CheckFailed(
                f"{self.model}: a process ended with code {broken[0]}. Its answers are kept in {self.journal}; type "
                "the same command again to go on, with fewer --processes if memory ran out."
            )


def _stop(workers: Sequence[SpawnProcess]) -> None:
    """End what still runs: another one failed, or the user interrupted."""
    for worker in workers:
        if worker.is_alive():
            worker.terminate()
            worker.join()


def _worker(
    model: Path,
    shard: Sequence[Unit],
    max_new_tokens: int,
    threads: int,
    part: Path,
    number: int,
    count: Any,
    errors: Any,
) -> None:
    if devices := gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    try:
        answer_shard(model, shard, max_new_tokens, threads, part, lambda done: setattr(count, "value", done))
    except UserError as error:
        errors.put(str(error))


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names; without it, every GPU of which the machine has a device file."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device]
    return [str(number) for number, _ in enumerate(DEVICE_FILES.glob("nvidia[0-9]*"))]


def answer_shard(
    model: Path,
    shard: Sequence[Unit],
    max_new_tokens: int,
    threads: int,
    part: Path,
    report: Callable[[int], None],
) -> None:
    """Ask questions, unit by unit, and append each unit's answers to a part of the journal."""
    runtime = open_runtime(model, threads)
    runtime.use_gpu()
    done = 0
    try:
        with part.open("a", encoding="utf-8") as file:
            for unit in shard:
                samples = (evaluate_batch if unit.together else evaluate)(runtime, unit, max_new_tokens)
                file.writelines(json.dumps(vars(sample), ensure_ascii=False) + "\n" for sample in samples)
                file.flush()
                done += len(samples)
                report(done)
    finally:
        runtime.close()


def units(questions: Sequence[BenchQuestion], batch: int) -> list[Unit]:
    """What is answered and written at once: an image's questions, or a batch of questions in the order of their images.

    Args:
        questions: in any order.
        batch: 1 for an image's questions one after the other.
    """
    images: dict[str, list[BenchQuestion]] = {}
    for question in questions:
        images.setdefault(question.image or f"no image: {question.family} {question.id}", []).append(question)
    if batch == 1:
        return [Unit(group) for group in images.values()]
    ordered = [question for group in images.values() for question in group]
    return [Unit(ordered[start : start + batch], together=True) for start in range(0, len(ordered), batch)]


def weights_digest(model: Path) -> str:
    """What identifies a model's weights: its manifest's hash, else that of its safetensors files."""
    if (model / MANIFEST).is_file():
        return sha256(model / MANIFEST)
    return " ".join(sha256(path) for path in sorted(model.glob("*.safetensors")))
