"""Processors: their clocks (cpufreq), which of them are fast, and which a process may use."""

import re
from dataclasses import dataclass

from device_bench.sensors.base import Absent, integer, listing

FILES = ("cpuinfo_max_freq", "scaling_max_freq", "scaling_cur_freq", "scaling_governor")
GLOB = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/"
_PLACE = re.compile(r"/sys/devices/system/cpu/cpu([0-9]{1,4})/cpufreq/(\w+)")
_MOST = 4096  # no device has more processors; guards against a damaged list


@dataclass(frozen=True)
class Cpu:
    """Clocks of one processor in kHz."""

    highest: int | Absent
    allowed: int | Absent  # lowered by the system when it is hot
    now: int | Absent
    governor: str | Absent


def cpus(text: str) -> dict[int, Cpu]:
    """Parse `grep -H '' /sys/devices/system/cpu/cpu*/cpufreq/FILE...`: number -> clocks; offline ones have none."""
    found: dict[int, dict[str, str]] = {}
    for path, value in listing(text, FILES).items():
        if match := _PLACE.fullmatch(path):
            found.setdefault(int(match[1]), {})[match[2]] = value
    return {
        cpu: Cpu(
            highest=_khz(said, "cpuinfo_max_freq"),
            allowed=_khz(said, "scaling_max_freq"),
            now=_khz(said, "scaling_cur_freq"),
            governor=_governor(said.get("scaling_governor", "")),
        )
        for cpu, said in sorted(found.items())
    }


def _khz(said: dict[str, str], name: str) -> int | Absent:
    value = integer(said.get(name, ""))
    return value if value is not None and value > 0 else Absent(f"{name} is not readable")


def _governor(said: str) -> str | Absent:
    return said if re.fullmatch(r"[\w-]+", said) else Absent("scaling_governor is not readable")


def big_cluster(clocks: dict[int, Cpu]) -> list[int] | Absent:
    """Numbers of the fastest processors; a single fastest one is joined by the next fastest group."""
    highest = {cpu: each.highest for cpu, each in clocks.items() if not isinstance(each.highest, Absent)}
    if not highest:
        return Absent("no cpuinfo_max_freq is readable, so it is unknown which processors are fast")
    speeds = sorted(set(highest.values()), reverse=True)
    first = [cpu for cpu, khz in highest.items() if khz == speeds[0]]
    if len(first) == 1 and len(speeds) > 1:
        first += [cpu for cpu, khz in highest.items() if khz == speeds[1]]
    return sorted(first)


def mask(numbers: list[int]) -> str:
    """Processors as the hexadecimal mask that `taskset` takes."""
    return f"{sum(1 << cpu for cpu in set(numbers)):x}"


def cpu_list(text: str) -> list[int] | Absent:
    """Parse a list as the kernel writes it: "0-3,7"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST:
            return Absent(f"{text.strip()!r} is no list of processors")
        found.update(range(first, last + 1))
    return sorted(found)


def allowed(status: str) -> list[int] | Absent:
    """Processors that a process may use, from its /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith("Cpus_allowed_list:"):
            return cpu_list(line.partition(":")[2])
    return Absent("no Cpus_allowed_list line")
