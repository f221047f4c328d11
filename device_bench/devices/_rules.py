"""The rules around one timed pass on a device: what is recorded before and after, and which rules the run broke."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from device_bench.devices._estimate import Used, estimate
from device_bench.devices._link import Lost
from device_bench.devices._method import Energy, Gate, cool_down, energy, first_throttled, observe, settled_after
from device_bench.devices._requests import Reply, Results
from device_bench.devices._sensors import BOARD_LIMIT_C, PHONE_LIMIT_C, Reading, state
from device_bench.devices.base import Progress
from device_bench.sensors.base import Absent, known
from device_bench.sensors.cpus import cpu_list

if TYPE_CHECKING:
    from device_bench.devices._passes import Job
    from device_bench.devices._remote import RemoteDevice


class TimedRun:
    """What is known about the circumstances of a timed pass."""

    def __init__(
        self,
        device: "RemoteDevice",
        job: "Job",
        gate: Gate,
        steady: bool,
        idle: list[Reading],
        before: dict[str, Any],
    ) -> None:
        self._device, self._job, self._gate, self._steady = device, job, gate, steady
        self._idle, self._before = idle, before
        self._used = Used.now(device.link) if device.android else None
        self._after: dict[str, Any] = {}
        self._used_after: Used | None = None
        self._broken: list[str] = [gate.problem] if gate.problem else []

    def finish(self, results: Results, readings: Sequence[Reading]) -> None:
        """Look at the device again, and at what happened during the pass."""
        self._used_after = Used.now(self._device.link) if self._used else None
        self._after = state(self._device.link, self._device.sensors, self._device.android)
        if (found := first_throttled([*self._idle[-1:], *readings])) is not None:
            self._broken.append(f"the device throttled during the latency pass: {found[1]}")
        wanted, allowed = self._device.cluster, cpu_list(results.cpus or "")
        if not isinstance(wanted, Absent) and allowed != wanted:
            self._broken.append(f"the runner was to run on processors {wanted}, it ran on {results.cpus}")
        if not isinstance(wanted, Absent) and self._job.threads > len(wanted):
            count = f"{self._job.threads} threads on {len(wanted)} fast processors"
            self._broken.append(f"{count}, so that they waited for each other: --threads {len(wanted)}")

    def warmup(self, replies: Sequence[Reply]) -> int:
        """How many answers are left out; a run that never settles breaks a rule."""
        job = self._job
        room = len(replies) - job.iterations
        times = [reply.ttft_ms + sum(reply.decode_ms) for reply in replies]
        count = settled_after(times[:room], job.warmup)
        if count is None:
            self._broken.append(f"the times had not settled after {room} answers of warm-up")
            return min(job.warmup, room)
        return count

    def energy(self, results: Results, readings: Sequence[Reading], warmup: int) -> Energy | Absent:
        """Energy of the answers after the warm-up, measured; where nothing measures it, estimated over all answers."""
        replies, tokens = results.replies, self._job.decode_tokens + 1
        kept = replies[warmup:]
        start = replies[warmup - 1].end_s if warmup else results.start_s or 0.0
        found = energy(self._idle, readings, start, kept[-1].end_s, len(kept), len(kept) * tokens)
        if not isinstance(found, Absent) or self._used is None or self._used_after is None:
            return found
        guess = estimate(self._used, self._used_after, len(replies), len(replies) * tokens)
        return Absent(f"{found.reason}; {guess.reason}") if isinstance(guess, Absent) else guess

    def found(self) -> dict[str, Any]:
        """What the result says about the circumstances; on an emulated device broken rules are only notes."""
        cluster = self._device.cluster
        notes = ["preprocessing is done by the host: ttft_ms is from pixels in the device's memory to the first token"]
        if isinstance(cluster, Absent):
            notes.append(f"not pinned to fast processors: {cluster.reason}")
        elif self._job.threads < len(cluster):
            count = f"{self._job.threads} threads on {len(cluster)} fast processors"
            notes.append(f"{count}: --threads {len(cluster)} uses them all")
        if self._device.emulated and self._broken:
            notes.append(f"an emulated device, so these broken rules only count as notes: {'; '.join(self._broken)}")
        return {
            "before": self._before,
            "after": self._after,
            "method": {
                "gate": asdict(self._gate),
                "processors": known(cluster),
                "fixed_performance_mode": self._steady,
            },
            "notes": notes,
            "broken_rules": [] if self._device.emulated else self._broken,
        }

    def telemetry(self, readings: Sequence[Reading]) -> list[dict[str, Any]]:
        """Readings of the idle device and of the pass, as JSON."""
        return telemetry_rows([*self._idle, *readings])


@contextmanager
def measured(device: "RemoteDevice", job: "Job", on_progress: Progress) -> Iterator[TimedRun]:
    """Record the state, wait until the device is cool, watch it idle; what runs inside is the timed pass."""
    link, sensors = device.link, device.sensors
    on_progress(0.0, "recording the device's state")
    before = state(link, sensors, device.android)
    gate = passed_gate(device, job, on_progress)
    try:
        steady = device.begin_timing()  # before the idle device is watched: its clocks are the baseline
        idle = _idle(device, job, on_progress)
        yield TimedRun(device, job, gate, steady, idle, before)
    finally:
        with suppress(Lost):  # then `clean_up` does it
            device.end_timing()


def passed_gate(device: "RemoteDevice", job: "Job", on_progress: Progress) -> Gate:
    """Wait until the device is cool, or find that it is not."""
    return cool_down(
        lambda: observe(device.link, device.sensors, 0)[0],
        PHONE_LIMIT_C if device.android else BOARD_LIMIT_C,
        0 if device.emulated else job.cool_s,
        lambda text: on_progress(0.0, text),
        sleep=device.link.pause,
    )


def _idle(device: "RemoteDevice", job: "Job", on_progress: Progress) -> list[Reading]:
    idle = observe(device.link, device.sensors, 0)
    measurable = not (isinstance(idle[0].power_mw, Absent) and isinstance(idle[0].counter_mj, Absent))
    if measurable and job.idle_s:
        on_progress(0.0, "watching the idle device")
        idle = observe(device.link, device.sensors, job.idle_s)
    return idle


def telemetry_rows(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """Readings as JSON; what is absent is null."""
    return [
        {name: None if isinstance(value, Absent) else value for name, value in vars(reading).items()}
        for reading in readings
    ]
