"""The measuring method on a model of a device: a /sys tree whose heat, clocks and power follow its load."""

from collections.abc import Callable
from pathlib import Path

import pytest

from device_bench.devices._link import Lost
from device_bench.devices._method import (
    cool_down,
    energy,
    first_throttled,
    integral_mj,
    observe,
    settled_after,
    sustained,
)
from device_bench.devices._sensors import Reading, Sensors
from device_bench.sensors.base import Absent
from tests.shell_link import ShellLink


class Board:
    """A board of two clusters: first-order heat, power from load, and a governor that lowers clocks above 85 degrees.

    Args:
        system: folder that is its /sys.
    """

    IDLE_MW, FULL_MW = 900.0, 9000.0
    ROOM_C, WARMTH, TIME_CONSTANT_S = 25.0, 0.009, 40.0  # degrees per mW when settled

    def __init__(self, system: Path) -> None:
        self.system, self.time, self.celsius, self.load, self.used_mj = system, 0.0, 30.0, 0.0, 0.0
        for cpu, highest in enumerate((1800000, 1800000, 2400000, 2400000)):
            self.write(f"devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq", highest)
            self.write(f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor", "schedutil")
        self.write("class/thermal/thermal_zone0/type", "cpu-thermal")
        self.write("class/thermal/thermal_zone1/type", "PMIC-Die")
        self.write("class/thermal/thermal_zone1/temp", 100000)
        self.write("class/hwmon/hwmon2/name", "ina3221")
        self.write("class/hwmon/hwmon2/in1_label", "VDD_IN")
        self.show()

    def write(self, name: str, value: object) -> None:
        path = self.system / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")

    @property
    def power(self) -> float:
        slow = 0.5 if self.celsius > 85 else 1.0
        return self.IDLE_MW + self.load * slow * (self.FULL_MW - self.IDLE_MW)

    def step(self, seconds: float) -> None:
        """Let time pass in small steps; `used_mj` is the exact integral."""
        for _ in range(round(seconds / 0.01)):
            self.used_mj += self.power * 0.01
            settled = self.ROOM_C + self.WARMTH * self.power
            self.celsius += (settled - self.celsius) * 0.01 / self.TIME_CONSTANT_S
            self.time += 0.01
        self.show()

    def show(self) -> None:
        self.write("class/thermal/thermal_zone0/temp", int(self.celsius * 1000))
        self.write("class/hwmon/hwmon2/in1_input", 5000)
        self.write("class/hwmon/hwmon2/curr1_input", round(self.power / 5))
        for cpu in range(4):
            highest = 1800000 if cpu < 2 else 2400000
            allowed = highest // 2 if self.celsius > 85 else highest
            self.write(f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_max_freq", allowed)
            self.write(f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", allowed)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path / "sys")


@pytest.fixture
def read(board: Board) -> Callable[[], Reading]:
    link, sensors = ShellLink(), Sensors(android=False, system=str(board.system))
    sensors.locate(link)
    return lambda: sensors.read(board.time, link.run(sensors.script).out.splitlines())


def run(
    board: Board, read: Callable[[], Reading], seconds: int, load: Callable[[float], float], every: int = 1
) -> list[Reading]:
    readings = [read()]
    for second in range(0, seconds, every):
        board.load = load(second)
        board.step(every)
        readings.append(read())
    return readings


def test_a_moment_is_read_whole(board: Board, read: Callable[[], Reading]) -> None:
    reading = read()
    assert reading.deciding_c == 30.0 and reading.temperatures_c == {"cpu-thermal": 30.0}
    assert (reading.power_mw, reading.power_source) == (900.0, "hwmon VDD_IN")
    assert reading.clocks_mhz == {0: 1800, 1: 1800, 2: 2400, 3: 2400}
    assert isinstance(reading.charging, Absent)


def test_the_gate_waits_until_the_device_is_cool(board: Board, read: Callable[[], Reading]) -> None:
    run(board, read, 60, lambda second: 1.0, every=60)
    waits: list[str] = []
    gate = cool_down(read, 60, 1200, waits.append, clock=lambda: board.time, sleep=lambda s: idle(board, s))
    assert gate.problem is None and gate.first_c and gate.last_c
    assert gate.first_c > 60 >= gate.last_c
    assert gate.waited_s > 10 and len(waits) == gate.waited_s // 15


def idle(board: Board, seconds: float) -> None:
    board.load = 0.0
    board.step(seconds)


def test_a_device_that_stays_hot_is_refused_after_a_while(board: Board, read: Callable[[], Reading]) -> None:
    run(board, read, 60, lambda second: 1.0, every=60)
    gate = cool_down(read, 60, 100, clock=lambda: board.time, sleep=board.step)
    assert gate.problem and "at most 60 wanted after 105 s of waiting" in gate.problem


def test_a_device_without_a_thermometer_is_refused_at_once(board: Board, read: Callable[[], Reading]) -> None:
    (board.system / "class/thermal/thermal_zone0/temp").unlink()
    gate = cool_down(read, 60, 1200, clock=lambda: board.time, sleep=board.step)
    assert gate.problem and gate.problem.startswith("the temperature is unknown") and gate.waited_s == 0


def test_throttling_is_found_with_its_moment_and_cause(board: Board, read: Callable[[], Reading]) -> None:
    readings = run(board, read, 80, lambda second: 1.0, every=2)
    found = first_throttled(readings)
    assert found is not None
    hot = next(reading for reading in readings if reading.temperatures_c["cpu-thermal"] > 85)
    assert found[0] == pytest.approx(hot.time_s)
    assert found[1] == "the system lowered processor 0 from 1800 to 900 MHz"
    assert first_throttled(readings[:5]) is None


def test_a_power_mode_that_lowers_clocks_for_good_is_no_throttling(board: Board, read: Callable[[], Reading]) -> None:
    board.celsius = 90
    board.show()
    assert first_throttled([read(), read()]) is None


LOADS: list[Callable[[float], float]] = [
    lambda second: 0.6,
    lambda second: 0.2 + 0.01 * second,
    lambda second: 0.7 if second % 10 < 5 else 0.2,
]


@pytest.mark.parametrize("load", LOADS, ids=["constant", "rising", "waves"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 50.0), (2.5, 47.5)])
def test_energy_is_the_models_integral_within_two_percent(
    board: Board, read: Callable[[], Reading], load: Callable[[float], float], start: float, end: float
) -> None:
    readings, exact = [read()], []
    for second in range(50):
        board.load = load(second)
        before = board.used_mj
        for part in range(2):
            if start <= second + part / 2 < end:
                before_part = board.used_mj
                board.step(0.5)
                exact.append(board.used_mj - before_part)
            else:
                board.step(0.5)
        assert board.used_mj > before
        readings.append(read())
    found = integral_mj(readings, start, end)
    assert found == pytest.approx(sum(exact), rel=0.02)


def test_energy_per_answer_is_what_was_used_above_idle(board: Board, read: Callable[[], Reading]) -> None:
    resting = run(board, read, 5, lambda second: 0.0)
    start = board.time
    busy = run(board, read, 20, lambda second: 0.5)
    found = energy(resting, busy, start, board.time, answers=10, tokens=40)
    assert not isinstance(found, Absent)
    assert found.per_answer_j == pytest.approx((board.FULL_MW - board.IDLE_MW) * 0.5 * 20 / 1000 / 10, rel=0.05)
    assert found.per_token_j == pytest.approx(found.per_answer_j / 4)
    assert found.idle_w == pytest.approx(0.9) and found.source == "hwmon VDD_IN"


def test_energy_of_a_charging_battery_is_absent(board: Board, read: Callable[[], Reading]) -> None:
    for name in ("in1_label", "in1_input", "curr1_input"):
        (board.system / "class/hwmon/hwmon2" / name).unlink()
    battery = {"type": "Battery", "current_now": -412000, "voltage_now": 3900000, "status": "Discharging"}
    for name, value in battery.items():
        board.write(f"class/power_supply/battery/{name}", value)
    link, sensors = ShellLink(), Sensors(android=False, system=str(board.system))
    sensors.locate(link)
    readings = [sensors.read(float(when), link.run(sensors.script).out.splitlines()) for when in range(4)]
    assert readings[0].power_mw == pytest.approx(1606.8) and readings[0].charging is False
    board.write("class/power_supply/battery/status", "Charging")
    charging = [sensors.read(float(when), link.run(sensors.script).out.splitlines()) for when in range(4)]
    found = energy(readings, charging, 0, 3, 1, 1)
    assert isinstance(found, Absent) and "charging" in found.reason
    board.write("class/power_supply/battery/current_now", 412)
    unclear = sensors.read(0.0, link.run(sensors.script).out.splitlines())
    assert isinstance(unclear.power_mw, Absent) and "unit is not known" in unclear.power_mw.reason


def test_energy_is_absent_where_the_readings_do_not_reach(board: Board, read: Callable[[], Reading]) -> None:
    readings = run(board, read, 10, lambda second: 1.0)
    assert isinstance(integral_mj(readings, 0.0, 20.0), Absent)
    assert isinstance(integral_mj(readings[:1], 0.0, 1.0), Absent)


def test_a_sustained_run_tells_how_much_speed_was_lost(board: Board, read: Callable[[], Reading]) -> None:
    readings = run(board, read, 180, lambda second: 1.0, every=5)
    ends, when = [(0.0, 0)], 0.0
    while when < 180:
        hot = next(reading for reading in readings if reading.time_s >= when - 5).temperatures_c["cpu-thermal"] > 85
        when += 1.0 if hot else 0.5
        ends.append((when, 10))
    found = sustained(ends, readings)
    assert len(found["tok_s"]) == 3
    assert found["tok_s"][0] > found["tok_s"][-1] and 0.5 <= found["last_over_first"] < 0.9
    assert 30 < found["first_throttled_s"] < 120 and found["highest_c"] > 85


@pytest.mark.parametrize(
    ("times", "least", "count"),
    [
        ([100, 60, 50, 50, 50, 50], 3, 5),
        ([50, 50, 50, 50], 1, 3),
        ([50, 50, 50, 50, 50, 50], 5, 5),
        ([100, 50, 100, 50, 100], 3, None),
        ([50, 50], 1, None),
    ],
)
def test_warm_up_ends_when_three_answers_take_equally_long(times: list[float], least: int, count: int | None) -> None:
    assert settled_after(times, least) == count


def test_sensors_are_read_through_one_shell_at_even_times(board: Board) -> None:
    link, sensors = ShellLink(), Sensors(android=False, system=str(board.system))
    sensors.locate(link)
    readings = observe(link, sensors, 0.3, interval_s=0.1)
    assert [reading.deciding_c for reading in readings] == [30.0] * 4
    assert readings[-1].time_s - readings[0].time_s >= 0.25


def test_readings_that_were_cut_off_are_none(board: Board) -> None:
    link, sensors = ShellLink(), Sensors(android=False, system=str(board.system))
    sensors.locate(link)
    for lines in (0, 1, 5):
        link.cut_after = [lines]
        with pytest.raises(Lost):
            observe(link, sensors, 0)


def test_an_energy_counter_is_read_between_its_readings_and_preferred(tmp_path: Path) -> None:
    sensors = Sensors(android=True, system=str(tmp_path))
    link = Phone(tmp_path)
    sensors.locate(link)
    readings = []
    for second in range(11):
        link.joules = 100.0 + 2.0 * second
        readings.append(sensors.read(float(second), link.run(sensors.script).out.splitlines()))
    assert integral_mj(readings, 2.5, 7.5) == pytest.approx(10_000)
    assert readings[0].power_source == "power stats S1M_VDD_MIF+S2M_VDD_CPUCL2"
    found = energy(readings[:3], readings, 2.5, 7.5, 1, 1)
    assert isinstance(found, Absent) and "no more than when idle" in found.reason


class Phone(ShellLink):
    """A phone whose dumpsys has a thermal service and an energy meter."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.joules, self._folder = 0.0, folder

    def command(self, script: str) -> list[str]:
        meter = (
            "============= PowerStats HAL 2.0 energy meter ==============\n"
            f"  [S2M_VDD_CPUCL2]:CPU   {self.joules * 600:.2f} mWs\n"
            f"  [S1M_VDD_MIF]:DDR   {self.joules * 400:.2f} mWs\n"
            "  [VSYS_PWR_DISPLAY]:Display   77777.00 mWs\n"
            "========== End of PowerStats HAL 2.0 energy meter ==========\n"
        )
        (self._folder / "meter").write_text(meter)
        answers = f"*IPowerStats*) cat {self._folder}/meter;; *) echo 'Thermal Status: 0';;"
        says = f"dumpsys() {{ case $1 in {answers} esac; }}\n"
        return super().command(says + script)
