"""`dumpsys thermalservice`: how hot an Android device is, and whether it throttles."""

import re
from dataclasses import dataclass

from device_bench.sensors.base import Absent, celsius, integer, number, single

STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
OVERRIDDEN = Absent("the thermal status is overridden: adb shell cmd thermalservice reset")
LIVE = "Current temperatures from HAL:"
_ROW = re.compile(r"Temperature\{mValue=([^,]*), mType=(-?[0-9]{1,3}), mName=(.*), mStatus=-?[0-9]{1,3}\}")
# Types 6, 7 and 8 are voltage, current and charge of the battery: not temperatures at all.
KINDS = {0: "cpu", 1: "gpu", 2: "battery", 3: "skin", 4: "usb", 9: "npu"}
# Some vendors print types that are off by one; a name that says what it is wins.
NAMES = {"CPU": "cpu", "AP": "cpu", "GPU": "gpu", "NPU": "npu", "TPU": "npu", "SKIN": "skin"}
NAMES |= {"BATTERY": "battery", "BAT": "battery", "SUBBAT": "battery", "USB": "usb", "USB_PORT": "usb"}


@dataclass(frozen=True)
class Thermal:
    """Throttling status and the hottest live sensor of each kind in degrees Celsius."""

    status: int | Absent  # 0 none .. 6 shutdown, see STATUS
    cpu: float | Absent
    gpu: float | Absent
    npu: float | Absent
    skin: float | Absent
    battery: float | Absent


def thermal(text: str) -> Thermal:
    """Parse the output of `dumpsys thermalservice`.

    Only "Current temperatures from HAL" counts: the cached ones may be tens of degrees behind.
    """
    lines = [line.strip() for line in text.splitlines()]
    if why := _unusable(lines):
        return Thermal(*[Absent(why)] * 6)
    hottest = _hottest(_live(lines))
    kinds = ("cpu", "gpu", "npu", "skin", "battery")
    return Thermal(_status(lines), *(hottest.get(kind, Absent(f"no live {kind} temperature")) for kind in kinds))


def _unusable(lines: list[str]) -> str | None:
    if not any(line.startswith("Thermal Status:") for line in lines):
        return "no thermal service: 'Thermal Status:' is missing"
    if "HAL Ready: false" in lines:
        return "the thermal service has no sensors: HAL Ready: false"
    return None


def _status(lines: list[str]) -> int | Absent:
    if "IsStatusOverride: true" in lines:
        return OVERRIDDEN
    status = single((line.partition(":")[2] for line in lines if line.startswith("Thermal Status:")), "thermal status")
    if isinstance(status, Absent):
        return status
    value = integer(status)
    if value is None or not 0 <= value < len(STATUS):
        return Absent(f"thermal status: {status.strip()!r} found, 0 to 6 expected")
    return value


def _live(lines: list[str]) -> list[str]:
    """The rows of the live block, which ends at the next line that is none."""
    if lines.count(LIVE) != 1:
        return []
    rows = lines[lines.index(LIVE) + 1 :]
    end = next((i for i, line in enumerate(rows) if not line.startswith("Temperature{")), len(rows))
    return rows[:end]


def _hottest(rows: list[str]) -> dict[str, float | Absent]:
    """Kind -> its highest temperature; Absent where all its sensors are off."""
    matches = [match for row in rows if (match := _ROW.fullmatch(row))]
    shifted = any(_contradicts(match[3], int(match[2])) for match in matches)
    found: dict[str, float | Absent] = {}
    for match in matches:
        kind, degrees = _kind(match[3], int(match[2]), shifted), number(match[1])
        if kind is None or degrees is None:
            continue
        reading, before = celsius(degrees, match[3]), found.get(kind)
        if isinstance(reading, Absent):
            found.setdefault(kind, reading)
        elif before is None or isinstance(before, Absent) or before < reading:
            found[kind] = reading
    return found


def _named(name: str) -> str | None:
    return NAMES.get(name.upper().removeprefix("TYPE_"))


def _contradicts(name: str, type_: int) -> bool:
    """Whether name and type tell different kinds: then no type of this device can be trusted."""
    return _named(name) is not None and type_ in KINDS and _named(name) != KINDS[type_]


def _kind(name: str, type_: int, shifted: bool) -> str | None:
    if name.upper().startswith("TYPE_") or shifted:
        return _named(name)
    return KINDS.get(type_)
