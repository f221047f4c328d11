"""What the machine says of itself: identity, state, memory of this process, and who else uses the processors.

Everything is read from /proc and /sys; what cannot be read is None, with the reason beside it.
"""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

from vlm.config import Config

_THOUSAND = 1e3  # kHz -> MHz, millidegrees -> degrees


class Identity(Config):
    """The device a number was measured on."""

    kind: str  # phone | jetson | emulated | host
    name: str
    soc: str | None
    os: str | None
    kernel: str | None = None
    arch: str | None = None
    cpus: int | None = None
    memory_mb: int | None = None
    id: str | None = None  # tells two devices of one model apart; no serial number can be read from it


def device_id(serial: str) -> str | None:
    """A serial number as 12 hexadecimal digits of its SHA-256; None where there is none."""
    serial = serial.strip().strip("\0")
    return hashlib.sha256(serial.encode()).hexdigest()[:12] if serial else None


def read(path: str | Path) -> str | None:
    """Text of a small system file, stripped; None if it is missing or closed to us."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def field(text: str | None, key: str, separator: str = ":") -> str | None:
    """Value of the first line `key<separator>value` of a system file's text."""
    for line in (text or "").splitlines():
        name, found, value = line.partition(separator)
        if found and name.strip() == key:
            return value.strip().strip('"')
    return None


def available_cpus() -> list[int]:
    """Numbers of the processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def identify_host() -> Identity:
    """Identify the machine this runs on."""
    system = platform.uname()
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Identity(
        kind="host",
        name=read("/sys/class/dmi/id/product_name") or read("/proc/device-tree/model") or "local",
        soc=field(read("/proc/cpuinfo"), "model name") or system.processor or None,
        os=field(read("/etc/os-release"), "PRETTY_NAME", "=") or f"{system.system} {platform.mac_ver()[0]}".strip(),
        kernel=system.release,
        arch=system.machine,
        cpus=len(available_cpus()),
        memory_mb=pages * size // 2**20,
    )


def machine_state() -> dict[str, Any]:
    """Load average, governor, clocks and temperatures now; None where unreadable, `reasons` say why.

    Returns:
        {load_average: [1, 5, 15 min], governor, frequency_mhz: [per CPU], temperature_c: {zone: °C}, reasons: {...}}
    """
    cpufreq = [Path(f"/sys/devices/system/cpu/cpu{n}/cpufreq") for n in available_cpus()]
    governors = sorted({text for folder in cpufreq if (text := read(folder / "scaling_governor"))})
    clocks = [int(text) / _THOUSAND for folder in cpufreq if (text := read(folder / "scaling_cur_freq"))]
    zones = {_zone_name(zone): degrees for zone in _thermal_zones() if (degrees := _degrees(zone)) is not None}
    state: dict[str, Any] = {
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "governor": ", ".join(governors) or None,
        "frequency_mhz": clocks or None,
        "temperature_c": zones or None,
    }
    why = {
        "governor": "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor is not readable",
        "frequency_mhz": "/sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq is not readable",
        "temperature_c": "/sys/class/thermal has no readable zone",
    }
    return {**state, "reasons": {key: reason for key, reason in why.items() if state[key] is None}}


def status_mb(key: str) -> float | None:
    """A size of this process in MiB from /proc/self/status, for example VmHWM, its peak resident memory."""
    value = field(read("/proc/self/status"), key)
    return None if value is None else int(value.split()[0]) / 1024


def cpu_seconds(stat: str, cpus: list[int]) -> tuple[float, float]:
    """(busy, all) seconds of the given processors since boot, from the text of /proc/stat.

    Busy counts stolen time: another machine's load costs as much as another process's.
    """
    wanted = {f"cpu{n}" for n in cpus}
    busy = total = 0
    for line in stat.splitlines():
        name, *ticks = line.split()
        if name in wanted:
            user, nice, system, idle, iowait, irq, softirq, steal = (int(tick) for tick in ticks[:8])
            busy += user + nice + system + irq + softirq + steal
            total += user + nice + system + irq + softirq + steal + idle + iowait
    hertz = os.sysconf("SC_CLK_TCK")
    return busy / hertz, total / hertz


class OtherLoad:
    """Share of our processors' time that others used since this was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """0 to 1; None where /proc/stat cannot be read or no clock tick has passed."""
        now = self._now()
        if now is None or self._start is None:
            return None
        busy, total, own = (after - before for after, before in zip(now, self._start, strict=True))
        return max(0.0, busy - own) / total if total > 0 else None

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        stat = read("/proc/stat")
        if stat is None:
            return None
        busy, total = cpu_seconds(stat, available_cpus())
        return busy, total, sum(os.times()[:2])


def _thermal_zones() -> list[Path]:
    return sorted(Path("/sys/class/thermal").glob("thermal_zone*"))


def _zone_name(zone: Path) -> str:
    return f"{zone.name}:{read(zone / 'type') or '?'}"


def _degrees(zone: Path) -> float | None:
    text = read(zone / "temp")
    return int(text) / _THOUSAND if text and text.lstrip("-").isdigit() else None
