"""The fresh process in which one pass over one artifact runs: `python -m device_bench.worker JOB.json`.

It gets a job file and gives a result file; on standard output it says, one JSON object per line, how far it is.
Whatever an engine prints goes to standard error, which the parent keeps as the log.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TextIO

from device_bench.measure import Work, latency_pass, run_once
from device_bench.tasks.base import Sample
from device_bench.telemetry import OtherLoad, machine_state, status_mb
from vlm.config import Config
from vlm.data.scenes.draw import render
from vlm.data.scenes.question import DESCRIBE
from vlm.data.scenes.scene import TEST_START, make_scene
from vlm.errors import UserError
from vlm.folders import write_atomic
from vlm.runtimes import open_runtime, prepare
from vlm.runtimes.base import Runtime

# Training libraries: no artifact's process may have imported one; the engine torch, which runs checkpoints, may.
FORBIDDEN = ("torch", "transformers", "deepspeed")
USER_ERROR = 2
SAY_EVERY_S = 0.25

Pass = Literal["prepare", "load", "latency", "memory", "accuracy"]
Progress = Callable[[float, str], None]


class Job(Config):
    """One pass over one artifact, all paths absolute."""

    kind: Pass
    artifact: Path
    result: Path
    threads: int
    warmup: int
    iterations: int
    decode_tokens: int
    tasks: list[str]
    data: str | None
    limit: int | None
    part: tuple[int, int]
    scenes: int
    max_new_tokens: int
    min_seconds: float
    answers: Path  # written by the accuracy pass as it goes


def main(job_file: Path) -> int:
    """Run the job, write its result file, return the exit code: 0, or 2 where the user must change something."""
    job = Job.model_validate_json(job_file.read_text())
    channel = _claim_stdout()
    try:
        result = run(job, _reporter(channel))
    except UserError as error:
        write_atomic(job.result, json.dumps({"user_error": str(error)}))
        return USER_ERROR
    write_atomic(job.result, json.dumps(result))
    return 0


def run(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Open the artifact and run one pass, or only prepare it.

    The result says which training libraries ended up in this process.
    """
    if job.kind == "prepare":
        on_progress(0.0, "checking files")
        prepare(job.artifact)
        return {"prepared": True}
    on_progress(0.0, f"{job.kind}: loading")
    before = time.perf_counter()
    runtime = open_runtime(job.artifact, job.threads)
    runtime.tokenizer  # noqa: B018  (read at first use; it belongs to what must be ready before an answer)
    load_ms = (time.perf_counter() - before) * 1e3
    result = PASSES[job.kind](runtime, job, on_progress)
    runtime.close()
    imported = {name: name in sys.modules for name in FORBIDDEN}
    return {"engine": runtime.engine, "emulated": runtime.emulated, "load_ms": load_ms, "imported": imported, **result}


def load(runtime: Runtime, job: Job, on_progress: Progress) -> dict[str, Any]:
    """Nothing after the loading itself."""
    return {}


def latency(runtime: Runtime, job: Job, on_progress: Progress) -> dict[str, Any]:
    """Time the fixed request; notes the machine's state around it and how much of it others used."""
    work, state, others = _work(job), machine_state(), OtherLoad()
    samples = latency_pass(
        runtime, work, job.warmup, job.iterations, lambda done: on_progress(done, "latency"), job.min_seconds
    )
    share = {"others_share": others.share(), "others_reason": "no /proc/stat, or no time has passed"}
    return {"samples": samples, **share, "before": state, "after": machine_state()}


def memory(runtime: Runtime, job: Job, on_progress: Progress) -> dict[str, Any]:
    """Answer once and read the peak resident memory."""
    loaded = status_mb("VmRSS")
    run_once(runtime, _work(job))
    told = {"pss_mb": None, "pss_reason": "only Android's meminfo tells it"}
    return {"loaded_rss_mb": loaded, "peak_rss_mb": status_mb("VmHWM"), **told}


def accuracy(runtime: Runtime, job: Job, on_progress: Progress) -> dict[str, Any]:
    """Answer the benchmarks, image by image; every answer is on the disk before the next image."""
    # Here, so that the benchmarks do not count into the memory of the other passes.
    from device_bench.evaluate import evaluate, publish, score
    from device_bench.subset import chosen

    asked, editions = chosen(job.tasks, job.scenes, job.data, job.limit, job.part)
    samples: list[Sample] = []
    with job.answers.open("w") as file:
        for _, group in groupby(asked, key=lambda question: question.image):
            answered = evaluate(runtime, list(group), job.max_new_tokens)
            file.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in answered)
            file.flush()
            samples += answered
            on_progress(len(samples) / len(asked), f"accuracy: {len(samples)} of {len(asked)} questions")
    return {"accuracy": publish(score(samples), editions)}


PASSES: dict[Pass, Callable[[Runtime, Job, Progress], dict[str, Any]]] = {
    "load": load,
    "latency": latency,
    "memory": memory,
    "accuracy": accuracy,
}


def _work(job: Job) -> Work:
    return Work(render(make_scene(TEST_START)), DESCRIBE, job.decode_tokens)


def _claim_stdout() -> TextIO:
    """Keep standard output for ourselves and send whatever else prints there to standard error."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def _reporter(channel: TextIO) -> Progress:
    """Tells how far it is a few times a second, and when it is done: whoever listens needs a processor, too."""
    last, said = -1.0, -math.inf

    def report(fraction: float, message: str) -> None:
        nonlocal last, said
        now = time.monotonic()
        if now - said >= SAY_EVERY_S or (fraction >= 1 and last < 1):
            last, said = fraction, now
            channel.write(json.dumps({"fraction": round(fraction, 4), "message": message}) + "\n")

    return report


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
