"""The device's thermometer and battery: they follow the processor time that its emulated processes really use."""

import bisect
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STEP_S = 0.2
TICKS = os.sysconf("SC_CLK_TCK")


class Heat:
    """A model of first order: power follows load, temperature follows power.

    Args:
        folder: made; its folders thermal and power_supply stand for those of /sys/class.
        processes: ids of the device's processes now.
    """

    IDLE_MW, FULL_MW, VOLTS = 800.0, 5300.0, 4.0  # FULL: one processor is used whole
    ROOM_C, WARMTH = 28.0, 0.004  # degrees per mW when settled
    POWER_S, HEAT_S = 1.5, 3.0  # time constants

    def __init__(self, folder: Path, processes: Callable[[], list[int]]) -> None:
        self.folder, self._processes = folder, processes
        self.power, self.celsius = self.IDLE_MW, self.ROOM_C + self.WARMTH * self.IDLE_MW
        self._times: list[float] = []  # of the device's uptime
        self._used_mj: list[float] = []  # until then
        self._write("thermal/thermal_zone0/type", "cpu-thermal")
        self._write("power_supply/battery/type", "Battery")
        self._write("power_supply/battery/status", "Discharging")
        self._write("power_supply/battery/voltage_now", round(self.VOLTS * 1e6))
        self._show()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Let the model run meanwhile."""
        over = threading.Event()
        thread = threading.Thread(target=self._follow, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def integral_mj(self, start_s: float, end_s: float) -> float:
        """Energy that the model used between two moments of the device's uptime."""
        return self._until(end_s) - self._until(start_s)

    def _until(self, moment: float) -> float:
        place = bisect.bisect(self._times, moment)
        (t0, t1), (v0, v1) = (values[place - 1 : place + 1] for values in (self._times, self._used_mj))
        return v0 + (v1 - v0) * (moment - t0) / (t1 - t0)

    def _follow(self, over: threading.Event) -> None:
        now, used, spent, ended = _uptime(), (self._used_mj or [0.0])[-1], self._spent(), False
        while not ended:
            ended = over.wait(STEP_S)  # the last step reaches beyond all that was read meanwhile
            before, now = now, _uptime()
            earlier, spent = spent, self._spent()
            step = now - before
            # Only of those that lived at both moments is it known what they used in between.
            busy = sum(spent[pid] - earlier[pid] for pid in spent.keys() & earlier.keys())
            wanted = self.IDLE_MW + min(1.0, busy / step) * (self.FULL_MW - self.IDLE_MW)
            self.power += (wanted - self.power) * min(1.0, step / self.POWER_S)
            self.celsius += (self.ROOM_C + self.WARMTH * self.power - self.celsius) * min(1.0, step / self.HEAT_S)
            used += self.power * step
            self._times.append(now)
            self._used_mj.append(used)
            self._show()

    def _spent(self) -> dict[int, float]:
        """Processor seconds of each of the device's processes."""
        found = {}
        for pid in self._processes():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            found[pid] = (int(fields[11]) + int(fields[12])) / TICKS
        return found

    def _show(self) -> None:
        self._write("thermal/thermal_zone0/temp", round(self.celsius * 1000))
        self._write("power_supply/battery/current_now", -round(self.power / self.VOLTS * 1000))

    def _write(self, name: str, value: object) -> None:
        """Replace a file as a whole: a reader sees the old value or the new one."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "next").write_text(f"{value}\n")
        os.replace(path.parent / "next", path)


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
