"""How busy the processors are, and with what: /proc/stat, and one process's own time from /proc/PID/stat."""

import re
from dataclasses import dataclass

from device_bench.sensors.base import Absent

_CPU = re.compile(r"cpu([0-9]{1,4})((?: [0-9]{1,15}){8,10})")  # user nice system idle iowait irq softirq steal ...
_IDLE = (3, 4)
_TIMES = 8  # what follows, the guests', is in user and nice already
# The name of a program may hold anything; behind it come its state and numbers, of which two are its own ticks.
_PROCESS = re.compile(r"[0-9]{1,10} \(.*\) [A-Za-z]((?: -?[0-9]{1,20}){20,})")
_USER, _SYSTEM = 10, 11
SHORTEST = 200  # ticks of one processor, two seconds: in less, a tick more or less would be a percent
FITTING = 0.02  # by how much a process may seem to have used more than the processors say: both are sampled


@dataclass(frozen=True)
class Ticks:
    """Clock ticks since the device started: (busy, all) of each processor, and those of one process."""

    cpus: dict[int, tuple[int, int]]
    own: int | Absent


def ticks(text: str) -> Ticks:
    """Parse the `cpu<n>` lines of /proc/stat and the line of /proc/PID/stat; stolen time is busy, too."""
    cpus: dict[int, tuple[int, int]] = {}
    own: list[int] = []
    for line in map(str.rstrip, text.splitlines()):
        if match := _CPU.fullmatch(line):
            times = [int(word) for word in match[2].split()[:_TIMES]]
            whole = sum(times)
            cpus.setdefault(int(match[1]), (whole - sum(times[place] for place in _IDLE), whole))
        elif match := _PROCESS.fullmatch(line):
            numbers = match[1].split()
            own.append(int(numbers[_USER]) + int(numbers[_SYSTEM]))
    return Ticks(cpus, own[0] if len(own) == 1 else Absent("no line of one process's /proc/PID/stat"))


def others_share(first: Ticks, last: Ticks, cpus: list[int]) -> float | Absent:
    """Share of the processors' time between two moments that was busy, but not with the process, 0 to 1.

    Args:
        first, last: what was read then.
        cpus: numbers of the processors; of those that a process may use some may be switched off.
    """
    if isinstance(first.own, Absent) or isinstance(last.own, Absent):
        return first.own if isinstance(first.own, Absent) else last.own
    cpus = [cpu for cpu in cpus if cpu in first.cpus or cpu in last.cpus]
    if switched := [cpu for cpu in cpus if cpu not in first.cpus or cpu not in last.cpus]:
        return Absent(f"processor {switched[0]} was switched on or off meanwhile")
    if not cpus:
        return Absent("/proc/stat is not readable")
    each = [[after - before for before, after in zip(first.cpus[n], last.cpus[n], strict=True)] for n in cpus]
    busy, whole, own = sum(cpu[0] for cpu in each), sum(cpu[1] for cpu in each), last.own - first.own
    if whole < SHORTEST * len(cpus):
        return Absent("it was watched for less than two seconds")
    if own < 0 or any(cpu[0] < 0 for cpu in each):
        return Absent("the processors' ticks went backwards")
    if own - busy > FITTING * whole:
        return Absent("the process used more than all processors: the two do not fit together")
    return max(0, busy - own) / whole
