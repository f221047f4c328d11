"""Where power and energy are read: counters of the chip's rails, the module's rails, the battery's current."""

import re

from device_bench.devices._link import Link
from device_bench.sensors import energy, jetson
from device_bench.sensors.base import Absent, celsius, contents, integer, listing
from device_bench.sensors.tegrastats import tegra, total_power

SUPPLY_FILES = ("type", "scope", "status", "current_now", "voltage_now", "temp")
_SUPPLY = re.compile(r"/sys/class/power_supply/([\w.-]+)/(type|scope|status|current_now|voltage_now|temp)")
# Below this a current is in milliamperes on some vendors' kernels: its unit is not known.
LEAST_UA = 20_000
CHARGING = {"Charging", "Full", "Not charging"}
NO_COUNTER = Absent("no energy counter")
METER = "dumpsys android.hardware.power.stats.IPowerStats/default"
ODPM_FILES = ("energy_value", "enabled_rails")
# Subsystems of the power monitors whose energy an answer costs; displays and radios are not among them.
CHIP = re.compile(r"(cpu|gpu|tpu|tensor|ddr|memory|soc)", re.IGNORECASE)
# One line; tegrastats itself goes on until its pipe is closed. Where there is none, nothing is behind the word.
_SAID = "tegrastats: "
TEGRASTATS = f'echo "{_SAID}$(timeout 3 tegrastats --interval 100 2>/dev/null | head -n 1)"'


def has_meter(link: Link) -> bool:
    """Whether the device has a power stats service with rails."""
    return not isinstance(energy.meter(link.run(f"{METER} 2>/dev/null").out).rails, Absent)


def counter(text: str) -> tuple[float | Absent, str]:
    """Energy of the chip's rails since boot in millijoules, and who counts it: the service, else the kernel."""
    for source, rails in (("power stats", _meter(text)), ("on-device power monitor", _odpm(text))):
        if rails:
            return sum(rails.values()), f"{source} {'+'.join(sorted(rails))}"
    return NO_COUNTER, ""


def _meter(text: str) -> dict[str, float]:
    rails = energy.meter(text).rails
    if isinstance(rails, Absent):
        return {}
    return {name: rail.total_mj for name, rail in rails.items() if CHIP.match(rail.subsystem)}


def _odpm(text: str) -> dict[str, float]:
    """Of all monitors: a Pixel has two. A rail counts if the kernel says that it feeds the chip."""
    found: dict[str, float] = {}
    files = contents(text, ODPM_FILES)
    for path, lines in files.items():
        folder, _, name = path.rpartition("/")
        rails = energy.odpm("\n".join(lines)).rails_uj if name == "energy_value" else NO_COUNTER
        feeds = energy.enabled_rails("\n".join(files.get(f"{folder}/enabled_rails", [])))
        if not isinstance(rails, Absent):
            found |= {rail: uj / 1000 for rail, uj in rails.items() if CHIP.match(feeds.get(rail, ""))}
    return found


def power(text: str) -> tuple[float | Absent, str]:
    """Power of the whole device or module in milliwatts, and where it is read."""
    problems = []
    for kind, rails in _rails(text):
        if not isinstance(total := total_power(rails), Absent):
            return total.milliwatts, f"{kind} {'+'.join(total.rails)}"
        problems += [(total, kind)] if rails else []
    if problems:
        return problems[0]
    batteries = _batteries(text)
    if len(batteries) > 1:
        return Absent(f"several batteries share the load: {', '.join(sorted(batteries))}"), "battery"
    for name, files in batteries.items():
        microamperes, microvolts = integer(files.get("current_now", "")), integer(files.get("voltage_now", ""))
        if microamperes is not None and microvolts is not None and microvolts > 1_000_000:
            if abs(microamperes) < LEAST_UA:
                return Absent(f"{name}: current_now is {microamperes}; its unit is not known"), "battery"
            return abs(microamperes) * microvolts / 1e9, f"battery {name}: current_now x voltage_now"
    return Absent("no power sensor is readable: neither hwmon nor tegrastats nor a battery's current"), ""


def _rails(text: str) -> list[tuple[str, dict[str, float | Absent]]]:
    line = next((line.removeprefix(_SAID) for line in text.splitlines() if line.startswith(_SAID)), "")
    rails = (jetson.hwmon_rails(text), jetson.iio_rails(text), tegra(line).rails_mw)
    return list(zip(("hwmon", "iio", "tegrastats"), rails, strict=True))


def _batteries(text: str) -> dict[str, dict[str, str]]:
    """What feeds the device: no charger, and no battery of a mouse."""
    found: dict[str, dict[str, str]] = {}
    for path, value in listing(text, SUPPLY_FILES).items():
        if match := _SUPPLY.fullmatch(path):
            found.setdefault(match[1], {})[match[2]] = value
    return {
        name: files
        for name, files in found.items()
        if files.get("type") == "Battery" and files.get("scope") != "Device"
    }


def battery_c(text: str) -> float | Absent:
    """Temperature of the battery in degrees Celsius, as the kernel says it."""
    tenths = [integer(files.get("temp", "")) for files in _batteries(text).values()]
    known_ones = [value for value in tenths if value is not None]
    return celsius(max(known_ones) / 10, "battery") if known_ones else Absent("no battery's temperature is readable")


def charging(text: str) -> bool | Absent:
    """Whether a charger is connected, as the kernel says it."""
    states = {files.get("status", "") for files in _batteries(text).values()}
    if states & CHARGING:
        return True
    return False if states == {"Discharging"} else Absent("no battery's status is readable")
