"""The student's ScienceQA image test through every runtime: `python -m benchmarks.scienceqa_runtimes RUN --data DIR`.

Asks the same questions of the run's student (torch) and of each of its artifacts, and compares each artifact with the
student, paired. It goes on where it was interrupted; the records stay in RUN/scienceqa/.
"""

import argparse
import sys
import time
from pathlib import Path

from device_bench.evaluate import questions, score, versions
from device_bench.records import read_records, write_records
from device_bench.session import Session, weights_digest
from device_bench.stats import paired_difference
from device_bench.subset import subset
from device_bench.tasks.base import BenchQuestion, Sample, digest
from vlm.errors import UserError

FAMILY = "scienceqa"
QUESTIONS = 2017
NEW_TOKENS = 16  # a letter is read, and a student that knows none says nothing more worth reading


def answers(model: Path, asked: list[BenchQuestion], out: Path, threads: int, processes: int) -> list[Sample]:
    """The model's answers: those on the disk if they are of these weights and questions, else asked now."""
    header = {"model": weights_digest(model), "data": versions(asked), "max_new_tokens": NEW_TOKENS}
    name = f"{model.name}-{digest([str(header)])}"
    record, journal = out / f"{name}.jsonl", out / f"{name}.answers"
    if record.is_file():
        return read_records(record)
    session = Session(model, asked, header, journal, NEW_TOKENS, threads, processes)
    samples = session.run(lambda done, count: None)
    write_records(samples, record, header)
    session.clear()
    return samples


def main() -> None:
    """Print a line per runtime; exit 1 where an artifact's paired interval does not hold 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder with student/ and artifacts/")
    parser.add_argument("--data", type=Path, required=True, help="folder with ScienceQA's questions and pictures")
    parser.add_argument("--limit", type=int, help="ask only so many, drawn with seed 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    try:
        sys.exit(run(options.run, options.data, options.limit, options.threads, options.processes))
    except UserError as error:
        sys.exit(f"{error}")


def run(folder: Path, data: Path, limit: int | None, threads: int, processes: int) -> int:
    """Ask, compare, print; returns how many artifacts differ from the student."""
    asked = [question for question in questions([FAMILY], 1, data) if question.image]
    if len(asked) != QUESTIONS:
        print(f"{len(asked)} questions with a picture found, {QUESTIONS} are the test split's")
    asked = subset(asked, limit, 0) if limit else asked
    models = [folder / "student", *sorted(path for path in (folder / "artifacts").glob("*") if path.is_dir())]
    reference: list[Sample] = []
    differing = 0
    for model in models:
        start = time.monotonic()
        samples = answers(model, asked, folder / FAMILY, threads, processes)
        found = score(samples)["tasks"][FAMILY]
        line = f"{model.name:<18} {found['score']:6.2f} %  [{found['ci95'][0]:.1f}, {found['ci95'][1]:.1f}]"
        if reference:
            difference = paired_difference(reference, samples)[FAMILY]
            low, high = difference["ci95"]
            same = sum(a.answer == b.answer for a, b in zip(reference, samples, strict=True))
            differing += not low <= 0 <= high
            line += f"  {difference['points']:+.2f} points [{low:+.2f}, {high:+.2f}] p {difference['p']:.2g}"
            line += f"  {same} of {len(samples)} answers equal"
        else:
            reference = samples
            unasked = found["details"].get("unasked", 0)
            line += f"  chance {found['chance']:.1f} %, {unasked} of {len(samples)} do not fit into the context"
        print(f"{line}  {time.monotonic() - start:.0f} s", flush=True)
    return min(differing, 1)


if __name__ == "__main__":
    main()
