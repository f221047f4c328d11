"""What would be measured on a device, and what not and why: a look that changes nothing there."""

from device_bench.devices._bundle import examined
from device_bench.devices._estimate import Used
from device_bench.devices._method import observe
from device_bench.devices._recipe import ENGINES
from device_bench.devices._remote import ABIS, RemoteDevice
from device_bench.devices._sensors import BOARD_LIMIT_C, PHONE_LIMIT_C, Reading
from device_bench.sensors.base import Absent

Found = dict[str, str | Absent]
LEFT_OUT = Absent("an emulated processor: it is timed to try the way, reports leave that out")


def survey(device: RemoteDevice) -> Found:
    """Look at a device as a bench would.

    Raises:
        UserError: it cannot be reached.
    """
    identity = device.identify()
    reading, cluster = device.again(lambda: (observe(device.link, device.sensors, 0)[0], device.cluster))
    holder = device.again(device.claim.holder)
    emulated = identity.kind == "emulated"
    clocks: str | Absent = "clocks" if reading.allowed_mhz else Absent("no scaling_max_freq is readable")
    return {
        **_runners(identity.arch or "unknown"),
        "use": Absent(f"another bench ({holder}) is measuring on it") if holder else "free",
        "accuracy": "answers come back and are scored here",
        "speed": LEFT_OUT if emulated else "load, vision, first token, prefill, decode, all on the processor",
        "memory": LEFT_OUT if emulated else "peak RSS" + (" and PSS" if device.android else ""),
        "energy": LEFT_OUT if emulated else _energy(device, reading),
        "cool-down": _heat(device, reading),
        "throttling": clocks if isinstance(reading.status, Absent) else f"thermal status {reading.status}",
        "fast processors": cluster if isinstance(cluster, Absent) else ", ".join(map(str, cluster)),
    }


def _runners(arch: str) -> Found:
    if arch not in ABIS:
        return {"runner": Absent(f"processor {arch}: no runner; there are: {', '.join(ABIS)}")}
    return {f"runner for {engine}": examined(engine, ABIS[arch]) for engine in ENGINES}


def _heat(device: RemoteDevice, reading: Reading) -> str | Absent:
    limit = PHONE_LIMIT_C if device.android else BOARD_LIMIT_C
    if isinstance(heat := reading.deciding_c, Absent):
        return Absent(f"{heat.reason}: a result will be invalid")
    return f"{heat:.1f} degrees now, at most {limit:g} wanted"


def _energy(device: RemoteDevice, reading: Reading) -> str | Absent:
    found: str | Absent = reading.power_source
    if isinstance(reading.counter_mj, Absent) and isinstance(reading.power_mw, Absent):
        found = reading.power_mw
    elif reading.charging is not False and reading.power_source.startswith("battery"):
        found = Absent("its battery is charging or may be, so that its current says nothing: measure over Wi-Fi")
    if isinstance(found, Absent) and device.android and reading.charging is False:
        used = device.again(lambda: Used.now(device.link))
        return found if isinstance(used.milliampere_hours, Absent) else "batterystats: an estimate of Android's model"
    return found
