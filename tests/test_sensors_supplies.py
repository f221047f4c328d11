"""What feeds a device, and what its services say where /sys is closed: the right battery or none."""

from dataclasses import replace
from pathlib import Path

import pytest

from device_bench.devices._emulated import is_emulated
from device_bench.devices._method import cool_down, energy
from device_bench.devices._sensors import Reading, Sensors
from device_bench.sensors import properties, thermal
from device_bench.sensors.base import Absent
from tests.shell_link import ShellLink

SYSTEM = {"type": "Battery", "status": "Discharging", "current_now": -950000, "voltage_now": 3900000, "temp": 301}
CHARGER = {"type": "Mains", "status": "Charging", "current_now": 2000000, "voltage_now": 9000000, "temp": 450}
MOUSE = {**SYSTEM, "scope": "Device", "temp": 222}
THERMAL = """IsStatusOverride: {overridden}
Thermal Status: {status}
HAL Ready: {ready}
Current temperatures from HAL:
\tTemperature{{mValue=31.5, mType=3, mName=VIRTUAL-SKIN, mStatus=0}}
Current cooling devices from HAL:
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: {powered}
  level: 80
  temperature: 312
"""


def read(tmp_path: Path, supplies: dict[str, dict[str, object]], android: bool = False) -> Reading:
    """A reading of a device with these power supplies."""
    for name, files in supplies.items():
        folder = tmp_path / "sys" / "class" / "power_supply" / name
        folder.mkdir(parents=True)
        for file, value in files.items():
            (folder / file).write_text(f"{value}\n")
    link, sensors = ShellLink(), Sensors(android, str(tmp_path / "sys"))
    sensors.locate(link)
    return sensors.read(0.0, link.run(sensors.script).out.splitlines())


def say(folder: Path, monkeypatch: pytest.MonkeyPatch, **services: str) -> None:
    """Put a dumpsys on the PATH."""
    for name, text in services.items():
        (folder / name).write_text(text)
    (folder / "dumpsys").write_text(f"#!/bin/sh\ncat {folder}/$1 2>/dev/null\n")
    (folder / "dumpsys").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_neither_a_charger_nor_a_mouse_is_the_battery(tmp_path: Path) -> None:
    found = read(tmp_path, {"a-charger": CHARGER, "battery": SYSTEM, "hidpp_battery_0": MOUSE})
    assert found.power_mw == pytest.approx(3705) and found.charging is False
    assert found.power_source == "battery battery: current_now x voltage_now"


def test_a_charger_is_no_source_where_the_battery_is_silent(tmp_path: Path) -> None:
    silent = {name: value for name, value in SYSTEM.items() if name != "current_now"}
    assert isinstance(read(tmp_path, {"a-charger": CHARGER, "battery": silent}).power_mw, Absent)


def test_of_several_batteries_none_is_the_devices_power(tmp_path: Path) -> None:
    power = read(tmp_path, {"BAT0": SYSTEM, "BAT1": SYSTEM}).power_mw
    assert isinstance(power, Absent) and "BAT0, BAT1" in power.reason


def test_energy_needs_a_battery_that_is_known_not_to_charge(tmp_path: Path) -> None:
    reading = read(tmp_path, {"battery": {**SYSTEM, "status": "Unknown"}})
    found = energy([reading], [reading], 0, 1, 1, 1)
    assert isinstance(found, Absent) and "battery's status" in found.reason


def test_the_battery_service_stands_in_for_what_the_system_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heat = THERMAL.format(overridden="false", status=0, ready="false")
    say(tmp_path, monkeypatch, thermalservice=heat, battery=BATTERY.format(powered="true"))
    found = read(tmp_path, {}, android=True)
    assert (found.deciding_c, found.charging) == (31.2, True)
    assert cool_down(lambda: found, 37, 0).problem is None


def test_a_thermal_status_that_somebody_overrode_does_not_pass_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(tmp_path, monkeypatch, thermalservice=THERMAL.format(overridden="true", status=4, ready="true"))
    problem = cool_down(lambda: read(tmp_path, {}, android=True), 37, 1200).problem
    assert problem and "overridden" in problem


def test_names_of_sensors_count_in_either_case() -> None:
    rows = (("25.3", 4, "skin"), ("44.0", 1, "cpu"), ("24.4", 3, "Battery"))
    text = "Thermal Status: 0\nHAL Ready: true\nCurrent temperatures from HAL:\n" + "".join(
        f"\tTemperature{{mValue={value}, mType={kind}, mName={name}, mStatus=0}}\n" for value, kind, name in rows
    )
    found = thermal.thermal(text)
    assert (found.skin, found.cpu, found.battery) == (25.3, 44.0, 24.4)


@pytest.mark.parametrize(
    ("said", "emulated"),
    [
        ("[ro.hardware]: [ranchu]", True),
        ("[ro.boot.hardware]: [cutf_cvm]", True),
        ("[ro.hardware]: [vsoc_arm64]", True),
        ("[ro.build.characteristics]: [nosdcard,emulator]", True),
        ("[ro.hardware]: [oriole]\n[ro.build.characteristics]: [nosdcard]", False),
    ],
)
def test_emulators_are_known_by_their_hardware(said: str, emulated: bool) -> None:
    assert properties.identity(said).emulated is emulated


def test_a_board_of_qemu_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    link = ShellLink()
    said = {"/sys/class/dmi/id/sys_vendor": "QEMU\n"}
    monkeypatch.setattr(link, "output", lambda *words: said.get(words[-1], ""))
    assert is_emulated(link)
    said.clear()
    assert not is_emulated(link)


TEGRASTATS = """#!/bin/sh
while :; do echo 'RAM 2448/7620MB (lfb 4x4MB) CPU [3%@729,off] VDD_IN 4021mW/3900mW VDD_CPU_GPU_CV 523mW/500mW'; done
"""


def test_tegrastats_stands_in_where_no_rail_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tegrastats").write_text(TEGRASTATS)
    (tmp_path / "tegrastats").chmod(0o755)
    assert isinstance(read(tmp_path / "a", {}).power_mw, Absent)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = read(tmp_path / "b", {})
    assert (found.power_mw, found.power_source) == (4021, "tegrastats VDD_IN")
    monitor = {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": 5000, "curr1_input": 600}
    for name, value in monitor.items():
        place = tmp_path / "c" / "sys" / "class" / "hwmon" / "hwmon0" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{value}\n")
    assert read(tmp_path / "c", {}).power_source == "hwmon VDD_IN"


def moment(time_s: float, counter_mj: float | Absent, source: str) -> Reading:
    """A reading of a phone on a charger whose battery draws 1 W."""
    cool = Absent("not asked")
    return Reading(time_s, cool, {}, cool, {}, {}, 1000.0, source, True, counter_mj)


def test_energy_is_never_made_of_two_sources() -> None:
    meter, none = "power stats CPU", Absent("the service was silent")
    idle = [moment(0, 0.0, meter), moment(10, 10_000.0, meter)]
    busy = [moment(time, 10_000.0 + 3000 * time, meter) for time in (10, 20, 30)]
    assert not isinstance(energy(idle, busy, 12, 28, 1, 1), Absent)
    for readings in (
        [busy[0], replace(busy[1], counter_mj=none), busy[2]],
        [replace(busy[0], counter_mj=100_000.0), *busy[1:]],
        [replace(each, counter_mj=none, power_source="hwmon VDD_IN", power_mw=5000.0) for each in busy],
    ):
        assert isinstance(energy(idle, readings, 12, 28, 1, 1), Absent)


def test_the_kernels_power_monitors_count_the_chips_rails_of_both(tmp_path: Path) -> None:
    monitors = (
        (("S2M_VDD_CPUCL2", "CPU", 30_000_000), ("VSYS_PWR_MODEM", "Cellular", 77_000_000)),
        (("S2S_VDD_G3D", "GPU", 5_000_000), ("VSYS_PWR_DISPLAY", "Display", 88_000_000)),
    )
    for number, rails in enumerate(monitors):
        folder = tmp_path / "sys" / "bus" / "iio" / "devices" / f"iio:device{number}"
        folder.mkdir(parents=True)
        lines = [f"CH{n}(T=349894)[{rail}], {uj}" for n, (rail, _, uj) in enumerate(rails)]
        (folder / "energy_value").write_text("\n".join(["t=349894", *lines, ""]))
        (folder / "enabled_rails").write_text("".join(f"CH{n}[{r}]:{feeds}\n" for n, (r, feeds, _) in enumerate(rails)))
    found = read(tmp_path, {"battery": SYSTEM}, android=True)
    assert found.counter_mj == pytest.approx(35_000)
    assert found.power_source == "on-device power monitor S2M_VDD_CPUCL2+S2S_VDD_G3D"
