"""What a device's sensors say at one moment, read by one cheap script: heat, clocks, power, charging."""

import re
from dataclasses import dataclass
from typing import Any

from device_bench.devices import _power
from device_bench.devices._link import Link, quote
from device_bench.sensors import cpus, jetson, memory, properties, thermal
from device_bench.sensors.base import Absent, celsius, integer, known, listing
from device_bench.sensors.battery import battery

PHONE_LIMIT_C = 37.0  # skin, else battery
BOARD_LIMIT_C = 60.0  # hottest of processor and graphics: boards throttle above 80
SOC_ZONE = re.compile(r".*(cpu|gpu|tj|soc|cv|thermal).*", re.IGNORECASE)
ZONE_FILES = ("type", "temp")
_ZONE = re.compile(r"/sys/class/thermal/(thermal_zone[0-9]{1,3})/(type|temp)")


@dataclass(frozen=True)
class Reading:
    """One moment on a device.

    Attributes:
        time_s: the device's uptime.
        deciding_c: what the thermal gate looks at: a phone's skin, else its battery; a board's hottest chip sensor.
        temperatures_c: every sensor that is on.
        status: Android's throttling status, 0 to 6.
        allowed_mhz: the highest clock that the system allows each processor now.
        clocks_mhz: of each processor.
        power_mw: of the whole device or module, and where that is read.
        counter_mj: an energy counter of the chip's rails, where there is one; it then counts, and names the source.
        charging: whether the battery is connected to a charger.
    """

    time_s: float
    deciding_c: float | Absent
    temperatures_c: dict[str, float]
    status: int | Absent
    allowed_mhz: dict[int, float]
    clocks_mhz: dict[int, float]
    power_mw: float | Absent
    power_source: str
    charging: bool | Absent
    counter_mj: float | Absent = _power.NO_COUNTER

    def throttled(self, before: "Reading | None" = None) -> str | None:
        """Why the device counts as throttled at this moment, or None.

        A power mode lowers the highest clock for good; only one that was higher at an earlier reading tells of heat.
        """
        if self.status == thermal.OVERRIDDEN:
            return thermal.OVERRIDDEN.reason
        if not isinstance(self.status, Absent) and self.status > 0:
            return f"thermal status {self.status} ({thermal.STATUS[self.status]})"
        for cpu, allowed in self.allowed_mhz.items() if before else ():
            if before and allowed < before.allowed_mhz.get(cpu, allowed):
                return f"the system lowered processor {cpu} from {before.allowed_mhz[cpu]:g} to {allowed:g} MHz"
        return None


class Sensors:
    """A device's sensors.

    Args:
        android: whether there is a thermal service to ask.
        system: where /sys is.
    """

    def __init__(self, android: bool, system: str = "/sys") -> None:
        self._android, self._system = android, system
        # A phone has a hundred zones and a service that knows which of them matter.
        globs = [] if android else [f"class/thermal/thermal_zone*/{name}" for name in ZONE_FILES]
        globs += [f"class/power_supply/*/{name}" for name in _power.SUPPLY_FILES]
        globs += [f"devices/system/cpu/cpu[0-9]*/cpufreq/{name}" for name in cpus.FILES]
        globs += [f"class/hwmon/hwmon*/{name}" for name in jetson.HWMON_FILES]
        globs += [f"bus/i2c/drivers/ina3221x/*/iio:device*/{name}" for name in jetson.IIO_FILES]
        globs += [f"bus/iio/devices/iio:device*/{name}" for name in _power.ODPM_FILES]
        paths = " ".join(f"{quote(system)}/{glob}" for glob in globs)
        # Only files that exist: dozens of names that do not would cost more than those that do.
        self.find = f'for f in {paths}; do [ -r "$f" ] && echo "$f"; done'
        self._files: str | None = None
        self._has_meter = self._asks_battery = self._asks_tegrastats = False

    def locate(self, link: Link) -> None:
        """Find out, once, which files there are."""
        self._files = quote(*link.run(self.find).out.splitlines())
        if self._android:
            self._has_meter = _power.has_meter(link)
        found = self.read(0, link.run(self.script).out.splitlines())
        if self._android:
            self._asks_battery = isinstance(found.deciding_c, Absent) or isinstance(found.charging, Absent)
        elif isinstance(found.power_mw, Absent):
            self._asks_tegrastats = True
            found = self.read(0, link.run(self.script).out.splitlines())
            self._asks_tegrastats = not isinstance(found.power_mw, Absent)

    @property
    def script(self) -> str:
        """The script whose output `read` understands."""
        files = f"grep -sH '' /dev/null {self._files}" if self._files else ":"
        services = ["dumpsys thermalservice 2>/dev/null"] if self._android else []
        services += [f"{_power.METER} 2>/dev/null"] if self._has_meter else []
        services += [_power.TEGRASTATS] if self._asks_tegrastats else []
        services += ["dumpsys battery 2>/dev/null"] if self._asks_battery else []
        return "\n".join([files, *services])

    def read(self, time_s: float, lines: list[str]) -> Reading:
        """Understand what the script printed at a moment."""
        text = "\n".join(self._named(line) for line in lines)
        heat = thermal.thermal(text)
        zones = _zones(text)
        clocks = cpus.cpus(text)
        power, source = _power.power(text)
        counter, rails = _power.counter(text)
        charging = _power.charging(text)
        if self._android:
            service = battery(text)
            charging = service.powered if isinstance(charging, Absent) else charging
            battery_c = next(
                (value for value in (heat.battery, _power.battery_c(text)) if not isinstance(value, Absent)),
                service.temperature_c,
            )
            deciding = battery_c if isinstance(heat.skin, Absent) else heat.skin
            kinds = {"skin": heat.skin, "battery": battery_c, "cpu": heat.cpu, "gpu": heat.gpu, "npu": heat.npu}
            zones |= {kind: value for kind, value in kinds.items() if not isinstance(value, Absent)}
        else:
            chips = [value for name, value in zones.items() if SOC_ZONE.fullmatch(name)]
            deciding = max(chips) if chips else Absent("no temperature of the chip is readable")
        return Reading(
            time_s=time_s,
            deciding_c=deciding,
            temperatures_c=zones,
            status=heat.status if self._android else Absent("no thermal service outside Android"),
            allowed_mhz={cpu: khz / 1000 for cpu, clock in clocks.items() if (khz := known(clock.allowed)) is not None},
            clocks_mhz={cpu: khz / 1000 for cpu, clock in clocks.items() if (khz := known(clock.now)) is not None},
            power_mw=power,
            power_source=rails or source,
            charging=charging,
            counter_mj=counter,
        )

    def _named(self, line: str) -> str:
        return "/sys" + line[len(self._system) :] if line.startswith(self._system + "/") else line


def _zones(text: str) -> dict[str, float]:
    said: dict[str, dict[str, str]] = {}
    for path, value in listing(text, ZONE_FILES).items():
        if match := _ZONE.fullmatch(path):
            said.setdefault(match[1], {})[match[2]] = value
    found: dict[str, float] = {}
    for zone, files in said.items():
        name, millidegrees = files.get("type") or zone, integer(files.get("temp", ""))
        if millidegrees is None or "pmic" in name.lower():
            continue
        degrees = known(celsius(millidegrees / 1000, name))
        if degrees is not None:
            found[name] = max(degrees, found.get(name, degrees))
    return found


def state(link: Link, sensors: Sensors, android: bool) -> dict[str, Any]:
    """The record of the device's state that a result carries: values, and in `reasons` why others are missing."""
    uptime = link.output("cat", "/proc/uptime").split()
    reading = sensors.read(float(uptime[0]) if uptime else 0.0, link.run(sensors.script).out.splitlines())
    found: dict[str, Any] = {
        "load_average": _loads(link.output("cat", "/proc/loadavg")),
        "frequency_mhz": list(reading.clocks_mhz.values()) or Absent("no scaling_cur_freq is readable"),
        "temperature_c": reading.temperatures_c or Absent("no temperature is readable"),
        "thermal_status": reading.status,
        "power_mw": reading.power_mw,
        "charging": reading.charging,
        "free_ram_kib": memory.kibibytes(link.output("cat", "/proc/meminfo"), "MemAvailable"),
    }
    clocks = cpus.cpus(link.run(sensors.script).out)
    governors = sorted({name for clock in clocks.values() if (name := known(clock.governor))})
    found["governor"] = ", ".join(governors) or Absent("no scaling_governor is readable")
    if android:
        charge = battery(link.output("dumpsys", "battery"))
        found |= {
            "fingerprint": properties.identity(link.output("getprop")).fingerprint,
            "battery_percent": charge.level,
        }
        found |= {"battery_status": charge.status, "screen": _screen(link.output("dumpsys", "power"))}
    else:
        found["power_mode"] = jetson.power_mode(link.output("nvpmodel", "-q")).name
        found["jetson_clocks"] = jetson.clocks_fixed(link.output("jetson_clocks", "--show"))
    reasons = {name: value.reason for name, value in found.items() if isinstance(value, Absent)}
    return {**{name: None if name in reasons else value for name, value in found.items()}, "reasons": reasons}


def _loads(text: str) -> list[float] | Absent:
    match = re.match(r"(\d+\.\d+) (\d+\.\d+) (\d+\.\d+) ", text)
    return [float(value) for value in match.groups()] if match else Absent("no /proc/loadavg")


def _screen(text: str) -> str | Absent:
    match = re.search(r"^\s*mWakefulness=(\w+)\s*$", text, re.MULTILINE)
    return match[1].lower() if match else Absent("dumpsys power does not say")
