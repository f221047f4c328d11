"""The passes of the bench on a device behind a connection, each one job for the runner."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_bench.devices._method import sustained
from device_bench.devices._requests import Asker, Reply, Request, blocks
from device_bench.devices._rules import measured, passed_gate, telemetry_rows
from device_bench.devices._watching import Timing, Watching, Weighing
from device_bench.devices.base import Progress, within
from device_bench.evaluate import grade, publish, score
from device_bench.sensors.base import Absent, known
from device_bench.subset import chosen
from device_bench.tasks.base import BenchQuestion, Sample
from vlm.config import Config
from vlm.data.scenes.draw import render
from vlm.data.scenes.question import DESCRIBE
from vlm.data.scenes.scene import TEST_START, make_scene
from vlm.errors import CheckFailed, UserError
from vlm.manifest import read_manifest

if TYPE_CHECKING:
    from device_bench.devices._remote import RemoteDevice

PICTURE = "image.f32"
BLOCK_BYTES = 2**28  # of pictures that lie on the device at once; the next block overwrites them
WEIGHED_S = 3.0  # of answering in the memory pass on Android: long enough for meminfo to be asked
WARMUPS = 3  # times the warm-up that was asked for: as long as it may take the device to settle


class Job(Config):
    """One pass over one artifact."""

    kind: str
    artifact: Path  # on this machine
    log: Path
    timeout_s: float
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
    sustained_s: float
    idle_s: float
    cool_s: float


def prepare(device: "RemoteDevice", job: Job, on_progress: Progress) -> dict[str, Any]:
    """Check every byte of the artifact on this machine; what arrived there was checked when it was pushed."""
    on_progress(0.0, "checking files")
    read_manifest(job.artifact, checksums=True)
    return {"prepared": True}


def load(device: "RemoteDevice", job: Job, on_progress: Progress) -> dict[str, Any]:
    """Load the model in a fresh process and ask one short question, which is not timed."""
    asker = Asker(job.artifact)
    ask = [Request("load", "-", asker.ids(DESCRIBE, False)[:2])]
    watching = Watching(on_progress, "load", 1, prefix=device.prefix)
    results = device.answer(job, _settings(asker, max_new_tokens=1), ask, watching)
    return {"load_ms": results.load_ms}


def latency(device: "RemoteDevice", job: Job, on_progress: Progress) -> dict[str, Any]:
    """Time the fixed request by the rules of docs/devices.md.

    The picture enters as pixels, so that preprocessing is no part of any time.
    """
    asker, ask = _fixed_request(device, job)
    with measured(device, job, on_progress) as run:
        most = WARMUPS * max(job.warmup, 1) + job.iterations
        requests = [Request(f"i{index}", ask.picture, ask.ids) for index in range(most)]
        watching = Timing(on_progress, "latency", most, device.sensors, device.prefix)
        floor = {"repeat_s": 0 if device.emulated else job.min_seconds, "repeat_from": most - job.iterations}
        settings = {**_timed(asker, job), **floor}
        results = device.answer(job, settings, requests, watching)
        run.finish(results, watching.readings)
    warmup = run.warmup(results.replies)
    kept = results.replies[warmup:]
    found, others = run.energy(results, watching.readings, warmup), watching.others_share(results)
    return {
        "load_ms": results.load_ms,
        "samples": {**samples_of(kept, job.decode_tokens), "telemetry": run.telemetry(watching.readings)},
        "others_share": known(others),
        "others_reason": others.reason if isinstance(others, Absent) else None,
        "energy": None if isinstance(found, Absent) else {"value": found.per_answer_j, **vars(found)},
        "energy_reason": found.reason if isinstance(found, Absent) else None,
        **run.found(),
    }


def sustained_run(device: "RemoteDevice", job: Job, on_progress: Progress) -> dict[str, Any]:
    """Answer the fixed request for minutes without a pause, to see what heat does to speed."""
    asker, ask = _fixed_request(device, job)
    longer = job.model_copy(update={"timeout_s": job.timeout_s + job.sustained_s})
    gate = passed_gate(device, job, on_progress)
    watching = Watching(on_progress, "sustained", 10**9, device.sensors, device.prefix)
    results = device.answer(longer, {**_timed(asker, job), "repeat_s": job.sustained_s}, [ask], watching)
    ends = [(results.start_s or 0.0, 0)]
    ends += [(reply.end_s, len(reply.tokens)) for reply in results.replies]
    return {
        "load_ms": results.load_ms,
        "sustained": {**sustained(ends, watching.readings), "gate": asdict(gate)},
        "broken_rules": [f"before the sustained run: {gate.problem}"] if gate.problem and not device.emulated else [],
        "raw": {"ends": ends, "telemetry": telemetry_rows(watching.readings)},
    }


def memory(device: "RemoteDevice", job: Job, on_progress: Progress) -> dict[str, Any]:
    """Answer the fixed request in a fresh process and read its peak resident memory; on Android PSS, too."""
    asker, ask = _fixed_request(device, job)
    weighing = Weighing(on_progress, "memory", 1) if device.android else Watching(on_progress, "memory", 1)
    settings = {**_timed(asker, job), "repeat_s": WEIGHED_S if device.android else 0}
    results = device.answer(job, settings, [ask], weighing)
    if results.peak_kib is None:
        raise CheckFailed(f"{job.artifact.name}: the memory pass: the runner left no vm_hwm_kib line. See {job.log}.")
    pss = weighing.highest() if isinstance(weighing, Weighing) else Absent("only Android's meminfo tells it")
    return {
        "load_ms": results.load_ms,
        "loaded_rss_mb": None,
        "peak_rss_mb": results.peak_kib / 1024,
        "pss_mb": None if isinstance(pss, Absent) else pss / 1024,
        "pss_reason": pss.reason if isinstance(pss, Absent) else None,
    }


def accuracy(device: "RemoteDevice", job: Job, on_progress: Progress) -> dict[str, Any]:
    """Ask the benchmarks there and score the answers here, with the same scorer as on this machine."""
    asker = Asker(job.artifact)
    asked, editions = chosen(job.tasks, job.scenes, job.data, job.limit, job.part)
    settings = {**_settings(asker, max_new_tokens=job.max_new_tokens), "reuse_images": 1}
    samples: list[Sample] = []
    for block in blocks(asked, max(1, BLOCK_BYTES // asker.picture_bytes)):
        ask, problems = asker.requests(block, device.scratch)
        part = within(on_progress, len(samples), len(asked), len(block))
        replies = device.answer(job, settings, ask, Watching(part, "accuracy", len(ask))).replies if ask else []
        samples += _graded(asker, block, replies, problems)
        device.save("answers.jsonl", [asdict(sample) for sample in samples])  # the device may be gone in the next
    return {"load_ms": None, "accuracy": publish(score(samples), editions)}


PASSES: dict[str, Callable[["RemoteDevice", Job, Progress], dict[str, Any]]] = {
    "prepare": prepare,
    "load": load,
    "latency": latency,
    "sustained": sustained_run,
    "memory": memory,
    "accuracy": accuracy,
}


def samples_of(replies: list[Reply], decode_tokens: int) -> dict[str, list[float]]:
    """Raw samples as the latency pass on this machine collects them.

    Raises:
        CheckFailed: a reply has not the decode steps that were asked for.
    """
    if any(len(reply.decode_ms) != decode_tokens or reply.vision_ms is None for reply in replies):
        raise CheckFailed(f"the runner answered with other than {decode_tokens} decode steps, or without the picture.")
    return {
        "preprocess_ms": [],
        "vision_ms": [reply.vision_ms for reply in replies if reply.vision_ms is not None],
        "prefill_ms": [reply.prefill_ms for reply in replies],
        "prefill_tokens": [float(reply.prefill_tokens) for reply in replies],
        "ttft_ms": [reply.ttft_ms for reply in replies],
        "decode_ms": [ms for reply in replies for ms in reply.decode_ms],
    }


def _fixed_request(device: "RemoteDevice", job: Job) -> tuple[Asker, Request]:
    asker = Asker(job.artifact)
    ids = asker.ids(DESCRIBE, True)
    needed, room = len(ids) + job.decode_tokens + 1, asker.facts.context_length
    if needed > room:
        raise UserError(
            f"{job.artifact}: context length {room} found, {needed} needed for the prompt and {job.decode_tokens} "
            "decode steps. Lower decode_tokens or export with a larger context_length."
        )
    asker.save_pixels(render(make_scene(TEST_START)), device.scratch / PICTURE)
    return asker, Request("fixed", PICTURE, ids)


def _settings(asker: Asker, max_new_tokens: int) -> dict[str, Any]:
    facts = asker.facts
    return {
        "eos": facts.eos_id,
        "image_token": facts.image_token_id,
        "context": facts.context_length,
        "max_new_tokens": max_new_tokens,
    }


def _timed(asker: Asker, job: Job) -> dict[str, Any]:
    """Settings under which every answer has the same length: the end token is an id that no vocabulary has."""
    return {**_settings(asker, max_new_tokens=job.decode_tokens + 1), "eos": asker.manifest.vocab_size}


def _graded(asker: Asker, asked: list[BenchQuestion], replies: list[Reply], problems: dict[str, str]) -> list[Sample]:
    by_name = {reply.id: reply for reply in replies}
    samples = []
    for place, question in enumerate(asked):
        reply = by_name.get(f"q{place}")
        if reply is None:
            samples.append(grade(question, "", problem=problems[f"q{place}"]))
            continue
        samples.append(
            grade(
                question,
                asker.tokenizer.decode(reply.tokens),
                ms=reply.prefill_ms + sum(reply.decode_ms),
                vision_ms=reply.vision_ms or 0.0,
                tokens=len(reply.tokens),
            )
        )
    return samples
