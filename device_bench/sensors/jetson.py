"""Jetson besides tegrastats: power mode (nvpmodel), fixed clocks (jetson_clocks), rails (hwmon and, before, iio)."""

import re
from dataclasses import dataclass

from device_bench.sensors.base import Absent, integer, listing, rail_mw, single

_MODE = re.compile(r"(?:NVPM VERB: Current mode: )?NV Power Mode: ?(\S+)")


@dataclass(frozen=True)
class PowerMode:
    """Name and number of the power mode. Compare names: the numbers differ between boards."""

    name: str | Absent
    id: int | Absent


def power_mode(text: str) -> PowerMode:
    """Parse the output of `nvpmodel -q`."""
    lines = [line.strip() for line in text.splitlines()]
    places = [i for i, line in enumerate(lines) if _MODE.fullmatch(line)]
    name = single((match[1] for line in lines if (match := _MODE.fullmatch(line))), "'NV Power Mode:' line")
    if isinstance(name, Absent):
        return PowerMode(name, name)
    following = lines[places[-1] + 1] if places[-1] + 1 < len(lines) else ""
    number = integer(following)
    return PowerMode(name, Absent("no number after the mode's name") if number is None or number < 0 else number)


_CLOCK = re.compile(r"cpu(\d{1,3}): Online=([01]) .*?MinFreq=(\d{1,12}) MaxFreq=(\d{1,12}) .*")
_GPU_CLOCK = re.compile(r"GPU MinFreq=(\d{1,12}) MaxFreq=(\d{1,12}) CurrentFreq=(\d{1,12}).*")


def clocks_fixed(text: str) -> bool | Absent:
    """Whether jetson_clocks has fixed the clocks, from `jetson_clocks --show` (needs root)."""
    rows = [match for line in text.splitlines() if (match := _CLOCK.fullmatch(line.strip()))]
    gpus = [match for line in text.splitlines() if (match := _GPU_CLOCK.fullmatch(line.strip()))]
    ranges = {(row[3], row[4]) for row in rows if row[2] == "1"} | {(row[1], row[2]) for row in gpus}
    if not rows or not gpus:
        return Absent("jetson_clocks --show printed no clocks (it needs root)")
    return all(low == high for low, high in ranges)


MONITORS = ("ina3221", "ina226", "ina238", "ina219")
CHANNELS = range(1, 9)
HWMON_FILES = (
    "name",
    *(f"{kind}{n}_{what}" for n in CHANNELS for kind, what in (("in", "label"), ("in", "input"), ("curr", "input"))),
)
_HWMON = re.compile(r"(/sys/class/hwmon/hwmon\d{1,4})/(\w+)")


def hwmon_rails(text: str) -> dict[str, float | Absent]:
    """Power of each labelled rail in milliwatts from `grep -H '' /sys/class/hwmon/hwmon*/FILE...`: no root needed.

    Power is in<n>_input [mV] times curr<n>_input [mA]; a shunt voltage, which has no current beside it, is no rail.
    """
    chips: dict[str, dict[str, str]] = {}
    for path, value in listing(text, HWMON_FILES).items():
        if match := _HWMON.fullmatch(path):
            chips.setdefault(match[1], {})[match[2]] = value
    rails: dict[str, float | Absent] = {}
    for said in chips.values():
        if said.get("name", "").split("-")[0] in MONITORS:
            for channel in CHANNELS:
                if rail := _channel(said, channel):
                    rails.setdefault(*rail)
    return rails


def _channel(said: dict[str, str], n: int) -> tuple[str, float | Absent] | None:
    label, volts, amperes = (said.get(name) for name in (f"in{n}_label", f"in{n}_input", f"curr{n}_input"))
    if not label or label == "NC" or amperes is None:
        return None
    millivolts, milliamperes = integer(volts or ""), integer(amperes)
    if millivolts is None or milliamperes is None:
        return label, Absent(f"{label}: voltage or current is not readable")
    return label, rail_mw(millivolts * milliamperes / 1000, label)


IIO_FILES = tuple(f"{name}{n}{rest}" for n in range(3) for name, rest in (("rail_name_", ""), ("in_power", "_input")))


def iio_rails(text: str) -> dict[str, float | Absent]:
    """Power of each rail in milliwatts from JetPack 4's ina3221x drivers, before there was hwmon."""
    said = listing(text, IIO_FILES)
    rails: dict[str, float | Absent] = {}
    for path, label in said.items():
        folder, _, file = path.rpartition("/")
        if file.startswith("rail_name_") and label and label != "NC":
            milliwatts = integer(said.get(f"{folder}/in_power{file[-1]}_input", ""))
            missing = Absent(f"{label}: power is not readable")
            rails.setdefault(label, missing if milliwatts is None else rail_mw(milliwatts, label))
    return rails
