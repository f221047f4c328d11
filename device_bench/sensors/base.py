"""A reading that is not there, and the strict numbers that all parsers use."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")

# No sensor has more digits; an endless row of them is damage, and int() would refuse it with an exception.
_DECIMAL = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?")
_WHOLE = re.compile(r"[+-]?[0-9]{1,15}")

# 80 uV, the offset of an INA3221, across a shunt of 5 milliohms at 20 V is 320 mW.
RAIL_OFF_MW, RAIL_MOST_MW = 320, 500_000


@dataclass(frozen=True)
class Absent:
    """What a reading is instead of a number when the number is not known."""

    reason: str


def number(text: str) -> float | None:
    """The number that `text` is, surrounding blanks aside; None for anything else, NaN and infinity too."""
    return float(text) if _DECIMAL.fullmatch(text := text.strip()) else None


def integer(text: str) -> int | None:
    """The whole number that `text` is, surrounding blanks aside; None for anything else."""
    return int(text) if _WHOLE.fullmatch(text := text.strip()) else None


def within(value: float, low: float, high: float, what: str, unit: str) -> float | Absent:
    """`value` if it lies in [low, high], else Absent: a sensor that is off often prints an impossible number."""
    if low <= value <= high:
        return value
    return Absent(f"{what}: {value:g} {unit} found, {low:g} to {high:g} expected")


def single(values: Iterable[Value], what: str) -> Value | Absent:
    """The value that all of `values` are; Absent if there is none, or if they differ."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
        return distinct[0]
    return Absent(f"{what}: several different values found" if distinct else f"no {what} found")


def known(value: Value | Absent) -> Value | None:
    """The value, or None where it is absent."""
    return None if isinstance(value, Absent) else value


def celsius(degrees: float, what: str) -> float | Absent:
    """A temperature in degrees; 0.0 and anything at or below -40 is how a sensor that is off reads."""
    if degrees == 0 or degrees <= -40:
        return Absent(f"{what}: prints {degrees:g}, which means that the sensor is off")
    return within(degrees, -40, 150, what, "degrees Celsius")


def rail_mw(milliwatts: float, name: str) -> float | Absent:
    """Power of a supply rail; one that feeds nothing reads a little on either side of 0, as far as its sensor is off.

    A sum keeps the sign: taking the negative ones for 0 would add up the sensors' errors instead of cancelling them.
    """
    return within(milliwatts, -RAIL_OFF_MW, RAIL_MOST_MW, name, "mW")


def listing(text: str, files: Iterable[str]) -> dict[str, str]:
    """First lines of small system files, from `grep -H '' FILE...`: path -> line; see `contents`."""
    return {path: lines[0] for path, lines in contents(text, files).items()}


def contents(text: str, files: Iterable[str]) -> dict[str, list[str]]:
    """Contents of small system files from `grep -H '' FILE...`: path -> its lines.

    Args:
        text: lines `path:content`.
        files: names of the files that were asked for; lines of any other file are ignored.
    """
    names = "|".join(re.escape(name) for name in files)
    pattern = re.compile(rf"(/(?:[^/\n]+/)*?(?:{names})):(.*)")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := pattern.fullmatch(line.rstrip("\r")):
            found.setdefault(match[1], []).append(match[2].strip())
    return found
