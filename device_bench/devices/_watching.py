"""What happens on this machine while the runner works on the device: answers are counted, sensors read."""

from collections.abc import Sequence

from device_bench.devices._requests import Results
from device_bench.devices._sensors import Reading, Sensors
from device_bench.devices.base import Progress
from device_bench.sensors.base import Absent
from device_bench.sensors.cpus import cpu_list
from device_bench.sensors.load import Ticks, others_share, ticks
from device_bench.sensors.memory import total_pss_kib

SOON_S = 1.0
# In the job's folder: one program a second, which leaves out the long lines of /proc/stat.
LOAD = "read pid 2>/dev/null <runner && grep -shE '^(cpu)?[0-9]+ ' /proc/stat /proc/$pid/stat"


class Watching:
    """Counts answers, and reads sensors if there are any.

    Args:
        on_progress, text, total: how far it is.
        sensors: read once a second, or None.
        prefix: words that start the runner, such as taskset's.
    """

    interval_s = SOON_S

    def __init__(
        self,
        on_progress: Progress,
        text: str,
        total: int,
        sensors: Sensors | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self._report, self._text, self._total = on_progress, text, total
        self._sensors, self.prefix = sensors, tuple(prefix)
        self.readings: list[Reading] = []

    @property
    def script(self) -> str:
        """What the device does once a second."""
        return self._sensors.script if self._sensors else ":"

    def on_results(self, results: Results) -> None:
        """Called after every line of results."""
        done = len(results.replies)
        self._report(min(1.0, done / self._total), f"{self._text}: {done} of {self._total}")

    def on_reading(self, uptime_s: float, lines: list[str]) -> None:
        """Called with what the sensors printed."""
        if self._sensors:
            self.readings.append(self._sensors.read(uptime_s, lines))


class Timing(Watching):
    """Meanwhile counts what the processors do, and what of it the runner does."""

    def __init__(
        self, on_progress: Progress, text: str, total: int, sensors: Sensors, prefix: Sequence[str] = ()
    ) -> None:
        super().__init__(on_progress, text, total, sensors, prefix)
        self._ticks: list[tuple[float, Ticks]] = []

    @property
    def script(self) -> str:
        """What the device does once a second."""
        return f"{LOAD}\n{super().script}"

    def on_reading(self, uptime_s: float, lines: list[str]) -> None:
        """Called with what was printed."""
        super().on_reading(uptime_s, lines)
        self._ticks.append((uptime_s, ticks("\n".join(lines))))

    def others_share(self, results: Results) -> float | Absent:
        """How busy others kept the runner's processors while it answered, 0 to 1."""
        start, end = results.start_s or 0.0, results.replies[-1].end_s
        seen = [found for when, found in self._ticks if start <= when <= end]
        cpus = cpu_list(results.cpus or "")
        if isinstance(cpus, Absent):
            return cpus
        return others_share(seen[0], seen[-1], cpus) if seen else Absent("it was watched for less than two seconds")


class Weighing(Watching):
    """Meanwhile asks Android's meminfo once a second for the runner's proportional memory (PSS)."""

    script = '[ -s runner ] && dumpsys meminfo "$(cat runner)" 2>/dev/null'  # in the job's folder

    def __init__(self, on_progress: Progress, text: str, total: int) -> None:
        super().__init__(on_progress, text, total)
        self._kib: list[int | Absent] = []

    def on_reading(self, uptime_s: float, lines: list[str]) -> None:
        """Called with what meminfo printed."""
        self._kib.append(total_pss_kib("\n".join(lines)))

    def highest(self) -> int | Absent:
        """The largest that was seen, in KiB."""
        seen = [kib for kib in self._kib if not isinstance(kib, Absent)]
        return max(seen) if seen else next(iter(self._kib), Absent("the runner ended before meminfo was asked"))
