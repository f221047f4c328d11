"""Energy counters of Android: Pixel's power stats service and the kernel's on-device power monitor (ODPM)."""

import re
from dataclasses import dataclass

from device_bench.sensors.base import Absent, integer, number

_BEGIN = re.compile(r"=+ PowerStats HAL [0-9.]+ energy meter =+")
_END = re.compile(r"=+ End of PowerStats HAL [0-9.]+ energy meter =+")
_ELAPSED = re.compile(r"Elapsed time: ([0-9]{1,15}) ms")
_RAIL = re.compile(r"\[([^\[\]]+)\]:(\S+)\s+(\S+) mWs(?: \(\s*(\S+)\))?")


@dataclass(frozen=True)
class Rail:
    """Energy of one supply rail in millijoules since boot, and since the counters were last asked."""

    subsystem: str
    total_mj: float
    delta_mj: float | Absent


@dataclass(frozen=True)
class Meter:
    """Energy meter of the power stats service."""

    elapsed_ms: int | Absent
    rails: dict[str, Rail] | Absent


def meter(text: str) -> Meter:
    """Parse `dumpsys android.hardware.power.stats.IPowerStats/default [delta]`.

    The energy since the last call stands in parentheses; the number before it counts since boot.
    """
    lines = [line.strip() for line in text.splitlines()]
    start = next((i for i, line in enumerate(lines) if _BEGIN.fullmatch(line)), None)
    end = next((i for i, line in enumerate(lines) if _END.fullmatch(line)), None)
    if start is None or end is None or end < start:
        why = Absent("no whole energy meter section: the device has no power stats service, or it was cut short")
        return Meter(why, why)
    section = lines[start:end]
    elapsed = [int(match[1]) for line in section if (match := _ELAPSED.fullmatch(line))]
    rails: dict[str, Rail] = {}
    for line in section:
        if rail := _rail(line):
            rails.setdefault(*rail)
    return Meter(
        elapsed[0] if len(elapsed) == 1 and elapsed[0] > 0 else Absent("no elapsed time: not asked for the delta"),
        rails or Absent("the energy meter lists no rails"),
    )


def _rail(line: str) -> tuple[str, Rail] | None:
    match = _RAIL.fullmatch(line)
    total = number(match[3]) if match else None
    if match is None or total is None or total < 0:
        return None
    delta = number(match[4] or "")
    usable = delta is not None and delta >= 0
    return match[1], Rail(match[2], total, delta if usable and delta is not None else Absent("no delta printed"))


_CHANNEL = re.compile(r"CH[0-9]+\(T=([0-9]{1,15})\)\[([^\[\]]+)\], ([0-9]{1,15})")


@dataclass(frozen=True)
class Odpm:
    """Energy of each rail in microjoules since boot, with the device's own milliseconds."""

    time_ms: int | Absent
    rails_uj: dict[str, int] | Absent


def odpm(text: str) -> Odpm:
    """Parse an `energy_value` file of /sys/bus/iio (readable for root)."""
    rows = [match for line in text.splitlines() if (match := _CHANNEL.fullmatch(line.strip()))]
    heads = [line.strip().removeprefix("t=") for line in text.splitlines() if line.strip().startswith("t=")]
    time = integer(heads[0]) if len(heads) == 1 else None
    if not rows or time is None:
        why = Absent("no t= line and CHn(T=..)[RAIL] lines of one monitor: none there, or not readable without root")
        return Odpm(why, why)
    return Odpm(time, {row[2]: int(row[3]) for row in rows})


_ENABLED = re.compile(r"CH[0-9]+\[([^\[\]]+)\]:(\S+)")


def enabled_rails(text: str) -> dict[str, str]:
    """Parse the `enabled_rails` file beside it: rail -> what it feeds."""
    return {match[1]: match[2] for line in text.splitlines() if (match := _ENABLED.fullmatch(line.strip()))}
