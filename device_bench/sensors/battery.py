"""`dumpsys battery` and `dumpsys batterystats`: charge, temperature, and what Android believes was used."""

import re
from dataclasses import dataclass

from device_bench.sensors.base import Absent, celsius, integer, number, within

STATUS = {2: "charging", 3: "discharging", 4: "not charging", 5: "full"}
HEADER = "Current Battery Service state:"
_FIELD = re.compile(r"\s{2,}([A-Za-z][A-Za-z ]*): (.*)")
_SOURCES = ("AC powered", "USB powered", "Wireless powered", "Dock powered")


@dataclass(frozen=True)
class Battery:
    """State of the battery; every field a value or why there is none."""

    level: float | Absent  # percent
    status: str | Absent  # charging, discharging, not charging or full
    powered: bool | Absent
    temperature_c: float | Absent
    voltage_mv: float | Absent
    charge_uah: float | Absent


def battery(text: str) -> Battery:
    """Parse the output of `dumpsys battery`: the first block only, since vendors append logs with older values."""
    fields = _fields(text)
    if isinstance(fields, Absent):
        return Battery(*[fields] * 6)
    level, temperature = _whole(fields, "level"), _whole(fields, "temperature")
    voltage, charge, status = _whole(fields, "voltage"), _whole(fields, "Charge counter"), _whole(fields, "status")
    return Battery(
        level=level if isinstance(level, Absent) else _percent(level, fields),
        status=status if isinstance(status, Absent) else STATUS.get(status, Absent(f"battery status {status}")),
        powered=_powered(fields),
        temperature_c=temperature if isinstance(temperature, Absent) else celsius(temperature / 10, "battery"),
        voltage_mv=voltage if isinstance(voltage, Absent) else within(voltage, 2000, 20000, "battery voltage", "mV"),
        charge_uah=charge
        if isinstance(charge, Absent)
        else within(charge, 1, 1e8, "Charge counter (0: not counted)", "uAh"),
    )


def _fields(text: str) -> dict[str, str] | Absent:
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == HEADER), None)
    if start is None:
        return Absent(f"no battery service: {HEADER!r} is missing")
    found: dict[str, str] = {}
    for line in lines[start + 1 :]:
        if line.strip() and not line[0].isspace():
            break  # a log buffer or another section
        if "UPDATES STOPPED" in line:
            return Absent("the battery state is faked: adb shell dumpsys battery reset")
        if match := _FIELD.fullmatch(line.rstrip()):
            found.setdefault(match[1], match[2])
    return found


def _whole(fields: dict[str, str], name: str) -> int | Absent:
    if name not in fields:
        return Absent(f"no '{name}' line")
    value = integer(fields[name])
    return Absent(f"{name}: {fields[name]!r} is no whole number") if value is None else value


def _percent(level: int, fields: dict[str, str]) -> float | Absent:
    scale = _whole(fields, "scale") if "scale" in fields else 100
    if isinstance(scale, Absent) or scale <= 0:
        return Absent(f"battery scale: {fields['scale']!r} found")
    return within(level * 100 / scale, 0, 100, "battery level", "percent")


def _powered(fields: dict[str, str]) -> bool | Absent:
    said = [fields[name] for name in _SOURCES if name in fields]
    if not said or not {"true", "false"}.issuperset(said):
        return Absent("no '... powered' lines of true and false")
    return "true" in said


_CAPACITY = re.compile(r"\s*Capacity: ([^,]+), Computed drain: ([^,]+), actual drain: (.+)")
_USER = re.compile(r"\s+(?:Uid|UID) (\w+): (\S+)(?: .*)?")


@dataclass(frozen=True)
class PowerUse:
    """Android's model of what used the battery: an estimate, never a measurement."""

    capacity_mah: float | Absent
    by_uid: dict[str, float]  # "2000" or "u0a195" -> mAh


def power_use(text: str) -> PowerUse:
    """Parse "Estimated power use" of `dumpsys batterystats`."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Estimated power use (mAh):"), None)
    if start is None:
        return PowerUse(Absent("no 'Estimated power use (mAh):' block"), {})
    capacity: float | Absent = Absent("no 'Capacity:' line")
    users: dict[str, float] = {}
    for line in lines[start + 1 :]:
        if not line.strip() or not line[0].isspace():
            break
        if match := _CAPACITY.fullmatch(line):
            said = number(match[1])
            capacity = Absent(f"capacity {match[1]!r}") if said is None else within(said, 1, 1e6, "capacity", "mAh")
        elif (match := _USER.fullmatch(line)) and (used := number(match[2])) is not None and used >= 0:
            users.setdefault(match[1], used)
    return PowerUse(capacity, users)
