"""Memory of a process and of the device: /proc/PID/status, /proc/meminfo, `dumpsys meminfo`."""

import re

from device_bench.sensors.base import Absent, integer, single

_PSS = re.compile(r"TOTAL(?: PSS)?:\s+([0-9]+)(?:\s.*)?")
_TABLE = re.compile(r"TOTAL\s+([0-9]+)(?:\s+[0-9]+){4,}")
_PROCESS = re.compile(r"\*\* MEMINFO in pid ([0-9]+) \[.*\] \*\*")


def kibibytes(text: str, key: str) -> int | Absent:
    """A size from /proc/PID/status (`VmHWM`: peak resident memory) or /proc/meminfo (`MemAvailable`), in KiB."""
    pattern = re.compile(rf"{re.escape(key)}:\s+([0-9]{{1,15}}) kB\s*")
    return single((int(match[1]) for line in text.splitlines() if (match := pattern.fullmatch(line))), f"{key} line")


def total_pss_kib(text: str, pid: int | None = None) -> int | Absent:
    """Proportional memory of an app from `dumpsys meminfo PACKAGE`, in KiB.

    Args:
        text: the output.
        pid: the process, where the package has several.
    """
    blocks: dict[int, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := _PROCESS.fullmatch(line.strip()):
            current = blocks.setdefault(integer(match[1]) or 0, [])
        current.append(line)
    if not blocks:
        return Absent("no '** MEMINFO in pid' block: the process does not run")
    if pid is None and len(blocks) > 1:
        return Absent(f"several processes: {', '.join(map(str, blocks))}")
    lines = blocks.get(next(iter(blocks)) if pid is None else pid)
    if lines is None:
        return Absent(f"no block of process {pid}")
    stripped = [line.strip() for line in lines]
    summary = stripped[stripped.index("App Summary") :] if "App Summary" in stripped else []
    total = single(_matches(_PSS, summary), "TOTAL PSS line")
    return single(_matches(_TABLE, stripped), "TOTAL line") if isinstance(total, Absent) else total


def _matches(pattern: re.Pattern[str], lines: list[str]) -> list[int]:
    found = (pattern.fullmatch(line) for line in lines)
    # Every process has memory: 0 is what the service prints where it may not read it.
    return [value for match in found if match and (value := integer(match[1]))]
