"""Measures artifacts on a device: one result file per artifact, every pass in a fresh process."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from device_bench.config import BenchConfig
from device_bench.devices import open_device
from device_bench.devices.base import Device, Progress, within
from device_bench.evaluate import questions
from device_bench.result import Recorder, describe
from device_bench.together import merge
from vlm.errors import CheckFailed, UserError

JOB_SETTINGS = {"warmup", "iterations", "decode_tokens", "tasks", "data", "limit", "part", "scenes", "max_new_tokens"}
# Share of an artifact's time that each pass takes, for the progress bar.
SHARES = {"load": 0.1, "latency": 0.15, "sustained": 0.0, "memory": 0.05, "accuracy": 0.7}


def silent(fraction: float, message: str) -> None:
    """Progress that nobody watches."""


def run(
    config: BenchConfig,
    artifacts: list[Path],
    out: Path,
    on_progress: Progress = silent,
    device: Device | None = None,
) -> list[Path]:
    """Measure artifacts one after the other; one that fails does not keep the others from being measured.

    Args:
        config: what to measure and how often.
        artifacts: artifact folders, or checkpoints (run with torch), with different names.
        out: results go to out/<device>/<artifact name>.json.
        on_progress: called with the fraction done (0 to 1) and what is being done.
        device: the configuration's, if it has been opened already.
    Raises:
        UserError: an artifact or the device is unusable.
        CheckFailed: a process crashed, was killed or imported a training library; the message names each.
    """
    _check(config, artifacts)
    results, failures = [], []
    device = device or open_device(config.device)
    with _left_clean(device):
        for index, artifact in enumerate(artifacts):
            try:
                results.append(_bench(device, artifact, config, out, within(on_progress, index, len(artifacts))))
            except CheckFailed as failure:
                failures.append(str(failure))
    if failures:
        raise CheckFailed("\n".join(failures))
    return results


@contextmanager
def _left_clean(device: Device) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        device.interrupt()
        raise
    finally:
        device.clean_up()


def run_on(
    devices: list[str],
    config: BenchConfig,
    artifacts: list[Path],
    out: Path,
    on_progress: Progress = silent,
    split: bool = False,
) -> list[Path]:
    """Measure artifacts on several devices at once, each device with its own queue.

    Args:
        devices: names as `--device` takes them, in place of the configuration's.
        config, artifacts, out, on_progress: as for `run`.
        split: the devices share the questions; each is asked about a part of the pictures.
    Raises:
        UserError, CheckFailed: as `run` does; the other devices' measurements are finished and written first.
    """
    _check_devices(devices, split)
    opened, done = {name: open_device(name) for name in devices}, dict.fromkeys(devices, 0.0)
    stopping = threading.Event()

    def one(name: str) -> list[Path]:
        def report(fraction: float, text: str) -> None:
            if stopping.is_set():
                raise KeyboardInterrupt
            done[name] = fraction
            on_progress(sum(done.values()) / len(done), f"{name}: {text}" if len(devices) > 1 else text)

        part = (devices.index(name), len(devices)) if split else config.part
        own = config.model_copy(update={"device": name, "part": part})
        return run(own, artifacts, out, report, opened[name])

    if len(devices) == 1:
        return one(devices[0])
    with ThreadPoolExecutor(len(devices)) as pool:
        queues = [pool.submit(one, name) for name in devices]
        try:
            wait(queues)
        except KeyboardInterrupt:
            on_progress(sum(done.values()) / len(done), "interrupted: every device is left clean")
            stopping.set()
            for device in opened.values():
                device.interrupt()
            raise
    results = _results(queues)
    if split and config.tasks:
        for shared in zip(*results, strict=True):
            merge(shared)
    return [path for each in results for path in each]


def _check_devices(devices: list[str], split: bool) -> None:
    if doubled := sorted({name for name in devices if devices.count(name) > 1}):
        raise UserError(f"--device {doubled[0]}: named twice. Each device once.")
    if "adb" in devices and len(devices) > 1:
        raise UserError("--device adb: several devices at once are each named by serial number: --device adb:SERIAL.")
    kinds = {name.partition(":")[0] for name in devices}
    if split and len(kinds) > 1:
        raise UserError(f"--split: devices of one kind share the questions, not {' and '.join(sorted(kinds))}.")


def _results(queues: list[Future[list[Path]]]) -> list[list[Path]]:
    """What each device has measured, or the problems of all."""
    problems = [problem for queue in queues if (problem := queue.exception()) is not None]
    expected = [problem for problem in problems if isinstance(problem, UserError | CheckFailed)]
    for problem in problems:
        if problem not in expected or len(problems) == 1:
            raise problem
    if problems:
        worst = UserError if any(isinstance(problem, UserError) for problem in problems) else CheckFailed
        raise worst("\n".join(map(str, problems)))
    return [queue.result() for queue in queues]


def bench_one(artifact: Path, config: BenchConfig, out: Path, on_progress: Progress = silent) -> Path:
    """Measure one artifact: cold loads, latency, peak memory, accuracy.

    Returns:
        The result file; its raw samples and answers lie beside it.
    Raises:
        UserError: the artifact or the device is unusable; what was measured before is written as an invalid result.
        CheckFailed: the measurement is invalid; the result file is written and says why.
    """
    device = open_device(config.device)
    with _left_clean(device):
        return _bench(device, artifact, config, out, on_progress)


def _bench(device: Device, artifact: Path, config: BenchConfig, out: Path, on_progress: Progress) -> Path:
    if config.sustained_s and "sustained_s" not in device.settings:
        raise UserError(
            f"sustained_s={config.sustained_s:g}: --device {device.spec} has no sustained run. Leave it out."
        )
    identity, pushed = device.identify(), device.push(artifact)  # before an older result is removed
    recorder = Recorder(artifact, config, identity, out / device.folder_name)
    try:
        _measure(recorder, device, pushed, on_progress)
    except CheckFailed as failure:
        recorder.invalidate(str(failure))
    except UserError as error:
        if recorder.begun:  # the device is gone, what it measured is not
            recorder.invalidate(str(error))
            with suppress(CheckFailed):
                recorder.write()
        raise
    return recorder.write()


def _measure(recorder: Recorder, device: Device, pushed: Path, on_progress: Progress) -> None:
    """Run the passes in their order and record each as soon as it is there."""
    config, name = recorder.config, recorder.name
    settings = config.model_dump(include=JOB_SETTINGS | device.settings)
    if config.data:
        settings["data"] = str(Path(config.data).resolve())  # a pass works in another folder
    job = {"artifact": pushed, **settings}
    # Once, and untimed: whether every file is whole, and what the engine compiles on first use.
    prepare = {**job, "kind": "prepare", "threads": config.threads}
    _run(device, prepare, recorder, within(on_progress, 0, 1, 0, f"{name}: "))
    done = 0.0
    for kind, share in SHARES.items():
        repeats = config.cold_loads if kind == "load" else 1
        for _ in range(repeats):
            if recorder.wants(kind):
                report = within(on_progress, done, 1, share / repeats, f"{name}: ")
                threads = config.accuracy_threads if kind == "accuracy" else config.threads
                recorder.record(kind, _run(device, {**job, "kind": kind, "threads": threads}, recorder, report))
            done += share / repeats


def _run(device: Device, job: dict[str, Any], recorder: Recorder, on_progress: Progress) -> dict[str, Any]:
    try:
        return device.run(job, recorder.log, recorder.config.timeout_s, on_progress)
    finally:
        if job["kind"] == "accuracy":  # also the answers that a crash has left
            device.pull("answers.jsonl", recorder.answers)


def _check(config: BenchConfig, artifacts: list[Path]) -> None:
    names = [artifact.resolve().name for artifact in artifacts]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"two artifacts are named {doubled[0]!r}: one result would overwrite the other. Use two --out folders."
        )
    for artifact in artifacts:
        describe(artifact)  # a damaged one is found before the first is measured
    if config.data:
        questions(config.tasks, 1, Path(config.data))  # and so are questions that are not there
