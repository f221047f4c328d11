"""Energy where nothing measures it: what Android's own model says that our user has used (batterystats)."""

from dataclasses import dataclass

from device_bench.devices._link import Link
from device_bench.devices._method import Energy
from device_bench.sensors.base import Absent
from device_bench.sensors.battery import battery, power_use

# The whole output is megabytes; the block ends at an empty line. Asking brings the statistics up to date.
STATISTICS = "dumpsys batterystats 2>/dev/null | sed -n '/Estimated power use/,/^ *$/p'"
SOURCE = "batterystats: Android's model of what user {} used, not a measurement"
JOULES_PER_MAH_AND_VOLT = 3.6
ROOT = "0"  # to whom the kernel and half of the system belong, too


@dataclass(frozen=True)
class Used:
    """What Android believes that a user has used since the battery was last full."""

    user: str
    milliampere_hours: float | Absent
    millivolts: float | Absent

    @classmethod
    def now(cls, link: Link) -> "Used":
        """Ask the device."""
        user = link.output("id", "-u").strip()
        if user == ROOT:
            return cls(user, Absent("adb is root, whose use is the whole system's: adb unroot"), Absent("not asked"))
        used = power_use(link.run(STATISTICS).out).by_uid.get(user)
        missing = Absent(f"batterystats says nothing of user {user}")
        return cls(user, missing if used is None else used, battery(link.output("dumpsys", "battery")).voltage_mv)


def estimate(before: Used, after: Used, answers: int, tokens: int) -> Energy | Absent:
    """Energy per answer and token from what the model counted in between; it leaves the idle device out by itself."""
    first, last, voltage = before.milliampere_hours, after.milliampere_hours, after.millivolts
    if isinstance(first, Absent) or isinstance(last, Absent):
        return first if isinstance(first, Absent) else Absent("batterystats was reset meanwhile")
    if isinstance(voltage, Absent):
        return voltage
    if last <= first:
        return Absent("batterystats counted nothing: it counts while the device runs on its battery")
    joules = (last - first) * voltage / 1000 * JOULES_PER_MAH_AND_VOLT
    return Energy(joules / answers, joules / tokens, None, SOURCE.format(before.user))
