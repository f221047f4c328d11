"""`tegrastats` of JetPack 4 to 7.2: one line per sample, and no two releases print it alike."""

import re
from dataclasses import dataclass

from device_bench.sensors.base import RAIL_MOST_MW, Absent, celsius, number, rail_mw, within

_TIME = re.compile(r"\d{2}-\d{2}-\d{4} \d{2}:\d{2}:\d{2}(?= )")
_RAM = re.compile(r"(?<!\S)RAM (\d{1,9})/(\d{1,9})MB(?!\S)")
_CPUS = re.compile(r"(?<!\S)CPU \[([^\]]*)\](?!\S)")
_CPU = re.compile(r"(\d{1,3})%@(\d{1,6})")
_LOAD = r"(?:(\d{1,3})%)?"
_GPU = re.compile(rf"(?<!\S)GR3D_FREQ {_LOAD}(?:@(?:\[([\d,]*)\]|(\d{{1,6}})))?(?!\S)")
_EMC = re.compile(rf"(?<!\S)EMC_FREQ {_LOAD}(?:@(\d{{1,6}}))?(?!\S)")
_DEGREES = re.compile(r"([A-Za-z]\w*)@(-?\d{1,4}(?:\.\d{1,6})?)C(?:/-?[\d.]+C)?")
# First of two or three values: now; the second is a running average. The unit is missing before JetPack 5.
_RAIL = re.compile(r"(?<!\S)([A-Z]\w*) (-?\d{1,9})(mW)?/-?\d{1,9}(?:mW)?(?:/-?\d{1,9}(?:mW)?)?(?!\S)")
_CONSTANT = "PMIC"  # prints 50 or 100 degrees whatever it is

# Where the whole module's power is one rail, and where it is a sum of rails that exclude each other.
WHOLE = ("VIN", "VDD_IN", "POM_5V_IN")
SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)


@dataclass(frozen=True)
class Power:
    """Power of the whole module, and the rails it was read from."""

    milliwatts: float
    rails: tuple[str, ...]


@dataclass(frozen=True)
class Tegra:
    """One line of tegrastats; every field a value or why there is none."""

    time: str | Absent
    ram_used_mb: int | Absent
    ram_total_mb: int | Absent
    cpus: list[tuple[int, int] | None] | Absent  # (percent, MHz); None: switched off
    gpu_percent: int | Absent
    gpu_mhz: list[int] | Absent
    emc_percent: int | Absent
    temperatures_c: dict[str, float | Absent]  # lower-case names
    rails_mw: dict[str, float | Absent]

    @property
    def power(self) -> Power | Absent:
        """Power of the whole module now."""
        return total_power(self.rails_mw)


def tegra(line: str) -> Tegra:
    """Parse one line."""
    line = " ".join(line.split())
    time, ram, emc, gpu = _TIME.match(line), _RAM.search(line), _EMC.search(line), _GPU.search(line)
    return Tegra(
        time=time[0] if time else Absent("no date: tegrastats prints it from JetPack 5 on"),
        ram_used_mb=int(ram[1]) if ram else Absent("no RAM field"),
        ram_total_mb=int(ram[2]) if ram else Absent("no RAM field"),
        cpus=_cpus(line),
        gpu_percent=_percent(gpu and gpu[1], "GR3D_FREQ"),
        gpu_mhz=_clocks(gpu),
        emc_percent=_percent(emc and emc[1], "EMC_FREQ (needs root from JetPack 6 on)"),
        temperatures_c=_temperatures(line),
        rails_mw=_rails(line),
    )


def total_power(rails: dict[str, float | Absent]) -> Power | Absent:
    """Power of the whole module from the power of its rails in milliwatts; a rail may be below 0, a module never."""
    names = next((names for names in (*((name,) for name in WHOLE), *SUMS) if all(name in rails for name in names)), ())
    if not names:
        return Absent(f"no rail of the whole module among {', '.join(sorted(rails)) or 'none'}")
    values = [rails[name] for name in names]
    if missing := [value for value in values if isinstance(value, Absent)]:
        return missing[0]
    total = sum(value for value in values if not isinstance(value, Absent))
    checked = within(total, 1, RAIL_MOST_MW, "+".join(names), "mW")
    return checked if isinstance(checked, Absent) else Power(checked, names)


def _cpus(line: str) -> list[tuple[int, int] | None] | Absent:
    match = _CPUS.search(line)
    if match is None:
        return Absent("no CPU [...] field")
    found: list[tuple[int, int] | None] = []
    for part in match[1].split(","):
        each = _CPU.fullmatch(part.strip())
        if each is None and part.strip() != "off":
            return Absent(f"CPU field {part.strip()!r} is neither LOAD%@MHZ nor off")
        if each and int(each[1]) > 100:
            return Absent(f"CPU load {each[1]} percent")
        found.append((int(each[1]), int(each[2])) if each else None)
    return found


def _percent(text: str | None, what: str) -> int | Absent:
    if text is None:
        return Absent(f"no load in {what}")
    return int(text) if int(text) <= 100 else Absent(f"{what}: {text} percent")


def _clocks(gpu: re.Match[str] | None) -> list[int] | Absent:
    text = (gpu[2] or gpu[3] or "") if gpu else ""
    parts = [number(part) for part in text.split(",")]
    if None in parts:
        return Absent("no clock in GR3D_FREQ (needs root from JetPack 6 on)")
    return [int(part) for part in parts if part is not None]


def _temperatures(line: str) -> dict[str, float | Absent]:
    found: dict[str, float | Absent] = {}
    for token in line.split(" "):
        match = _DEGREES.fullmatch(token)
        degrees = number(match[2]) if match else None
        if match is None or degrees is None:
            continue
        name, constant = match[1].lower(), match[1] == _CONSTANT
        reading = Absent("prints a constant") if constant else celsius(degrees, match[1])
        found.setdefault(name, reading)
    return found


def _rails(line: str) -> dict[str, float | Absent]:
    found: dict[str, float | Absent] = {}
    for match in _RAIL.finditer(line):
        if match[1] != "NC":  # not connected
            found.setdefault(match[1], rail_mw(float(match[2]), match[1]))
    return found
