"""`getprop`: what an Android device says it is."""

import re
from dataclasses import dataclass

from device_bench.sensors.base import Absent

EMULATORS = ("ranchu", "goldfish", "cutf", "vsoc")  # Android's emulator, Cuttlefish
_LINE = re.compile(r"\[([^\[\]]+)\]: \[(.*)\]")


@dataclass(frozen=True)
class Properties:
    """What identifies a device and its build."""

    fingerprint: str | Absent
    soc: str | Absent
    abi: str | Absent
    name: str | Absent
    android: str | Absent
    emulated: bool


def properties(text: str) -> dict[str, str]:
    """Parse the output of `getprop`; a value of several lines is left out, the first of two lines of a name counts."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line.strip()):
            found.setdefault(match[1], match[2])
    return found


def identity(text: str) -> Properties:
    """Read the identifying properties out of the output of `getprop`."""
    said = properties(text)
    names = [said.get(f"ro.product.{part}", "") for part in ("manufacturer", "model")]
    # ro.soc.model exists from Android 12 on; before, the platform's name is all there is.
    return Properties(
        fingerprint=_first(said, "ro.build.fingerprint", "ro.system.build.fingerprint"),
        soc=_first(said, "ro.soc.model", "ro.board.platform"),
        abi=_first(said, "ro.product.cpu.abi"),
        name=" ".join(filter(None, names)) or Absent("no ro.product.model"),
        android=_first(said, "ro.build.version.release"),
        emulated=_emulated(said),
    )


def _emulated(said: dict[str, str]) -> bool:
    board = {said.get(name, "").lower() for name in ("ro.hardware", "ro.boot.hardware")}
    kinds = said.get("ro.build.characteristics", "").split(",")
    asked = "1" in (said.get("ro.kernel.qemu"), said.get("ro.boot.qemu"))
    return asked or "emulator" in kinds or any(name.startswith(EMULATORS) for name in board)


def _first(said: dict[str, str], *names: str) -> str | Absent:
    values = (value for name in names if (value := said.get(name, "").strip()) and value.lower() != "unknown")
    return next(values, Absent(f"no {' or '.join(names)}"))
