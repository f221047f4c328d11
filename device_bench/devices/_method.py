"""How a device is measured so that another lab believes it: cool before, watched during, energy above idle."""

import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from device_bench.devices._link import Link, Lost
from device_bench.devices._sensors import Reading, Sensors
from device_bench.sensors.base import Absent
from device_bench.sensors.thermal import OVERRIDDEN
from vlm.errors import UserError

POLL_S = 15.0
SETTLED = 0.05  # warm-up is over when three answers in a row lie this close to their median
WINDOW = 3
SILENCE_S = 30.0
MINUTE = 60.0


def observe(link: Link, sensors: Sensors, seconds: float, interval_s: float = 1.0) -> list[Reading]:
    """Read the sensors for some seconds through one shell.

    Raises:
        Lost: the connection broke.
        UserError: the device does not do what the script says.
    """
    count = max(1, round(seconds / interval_s) + 1)
    script = (
        f'i=0\nwhile [ $i -lt {count} ]; do\necho "@time $(cat /proc/uptime)"\n{sensors.script}\n'
        f"i=$((i+1)); [ $i -lt {count} ] && sleep {interval_s}\ndone\necho @end"
    )
    readings: list[Reading] = []
    when: float | None = None
    lines: list[str] = []
    for line in link.follow(script, SILENCE_S + interval_s):
        match = re.fullmatch(r"@time (\d+\.?\d*) .*", line)
        if not match and line != "@end":
            lines.append(line)
            continue
        if when is not None:
            readings.append(sensors.read(when, lines))
        when, lines = (float(match[1]) if match else None), []
        if line == "@end":
            if not readings:
                raise UserError(f"--device {link.spec}: nothing but {lines} was read there, not even /proc/uptime.")
            return readings
    raise Lost("the connection broke while the sensors were read")


@dataclass(frozen=True)
class Gate:
    """How the thermal gate was passed, or that it was not."""

    waited_s: float
    first_c: float | None
    last_c: float | None
    problem: str | None  # why the device must not be measured now


def cool_down(
    read: Callable[[], Reading],
    limit_c: float,
    give_up_s: float,
    on_wait: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Gate:
    """Wait until the device does not throttle and is at most `limit_c` warm.

    Args:
        read: reads the sensors now.
        limit_c: highest deciding temperature in degrees Celsius.
        give_up_s: after so long the device is not cool; then `problem` says so.
        on_wait: gets what is waited for.
        clock, sleep: of this machine.
    """
    start = clock()
    reading = read()
    first = reading
    while (why := _too_hot(reading, limit_c)) is not None:
        if isinstance(reading.deciding_c, Absent) or reading.status == OVERRIDDEN or clock() - start >= give_up_s:
            break
        on_wait(f"cooling down: {why}")
        sleep(POLL_S)
        reading = read()
    waited = clock() - start
    temperatures = [None if isinstance(each.deciding_c, Absent) else each.deciding_c for each in (first, reading)]
    problem = why if why is None or waited == 0 else f"{why} after {waited:.0f} s of waiting"
    return Gate(waited, temperatures[0], temperatures[1], problem)


def _too_hot(reading: Reading, limit_c: float) -> str | None:
    if why := reading.throttled():
        return why
    if isinstance(reading.deciding_c, Absent):
        return f"the temperature is unknown: {reading.deciding_c.reason}"
    if reading.deciding_c > limit_c:
        return f"{reading.deciding_c:.1f} degrees found, at most {limit_c:g} wanted"
    return None


def settled_after(times_ms: Sequence[float], least: int) -> int | None:
    """How many answers are warm-up: at least `least`, until three in a row lie within 5 % of their median.

    Returns:
        The number of the first answers to leave out, or None where they never settle.
    """
    for count in range(max(least, WINDOW), len(times_ms) + 1):
        window = sorted(times_ms[count - WINDOW : count])
        if window[-1] - window[0] <= 2 * SETTLED * window[WINDOW // 2]:
            return count
    return None


def integral_mj(readings: Sequence[Reading], start_s: float, end_s: float) -> float | Absent:
    """Energy between two moments of the device's clock in millijoules: a counter's, else power by the trapezoid rule.

    Args:
        readings: in order of time; they must reach from `start_s` to `end_s`, within two readings' distance.
    """
    if not all(isinstance(reading.counter_mj, Absent) for reading in readings):
        return _counted(readings, start_s, end_s)  # or nothing: beside it the power is another sensor's
    points = []
    for reading in readings:
        if isinstance(reading.power_mw, Absent):
            return reading.power_mw
        points.append((reading.time_s, reading.power_mw))
    if len(points) < 2 or end_s <= start_s:
        return Absent("fewer than two readings of the power")
    step = (points[-1][0] - points[0][0]) / (len(points) - 1)
    if points[0][0] > start_s + 2 * step or points[-1][0] < end_s - 2 * step:
        return Absent("the readings of the power do not reach over the whole measurement")
    # Before the first and after the last reading the power is taken to stay.
    points = [(min(start_s, points[0][0]), points[0][1]), *points, (max(end_s, points[-1][0]), points[-1][1])]
    total = 0.0
    for (t0, p0), (t1, p1) in itertools.pairwise(points):
        low, high = max(t0, start_s), min(t1, end_s)
        if high > low:
            slope = (p1 - p0) / (t1 - t0)
            total += (p0 + slope * ((low + high) / 2 - t0)) * (high - low)
    return total


def _counted(readings: Sequence[Reading], start_s: float, end_s: float) -> float | Absent:
    """What an energy counter advanced between two moments, interpolated between readings."""
    points = [(each.time_s, each.counter_mj) for each in readings if not isinstance(each.counter_mj, Absent)]
    if len(points) < 2 or len(points) < len(readings) or any(b[1] < a[1] for a, b in itertools.pairwise(points)):
        return Absent("no energy counter that only grows")
    if points[0][0] > start_s or points[-1][0] < end_s:
        return Absent("the counter's readings do not reach over the whole measurement")
    return _at(points, end_s) - _at(points, start_s)


def _at(points: Sequence[tuple[float, float]], when: float) -> float:
    for (t0, v0), (t1, v1) in itertools.pairwise(points):
        if t0 <= when <= t1:
            return v0 + (v1 - v0) * ((when - t0) / (t1 - t0) if t1 > t0 else 1)
    raise ValueError(f"{when} is outside the readings")


@dataclass(frozen=True)
class Energy:
    """Energy of a measurement above the idle device, in joules, with its source; an estimate knows no idle power."""

    per_answer_j: float
    per_token_j: float
    idle_w: float | None
    source: str


def energy(
    idle: Sequence[Reading], busy: Sequence[Reading], start_s: float, end_s: float, answers: int, tokens: int
) -> Energy | Absent:
    """Energy per answer and token: the integral over the measurement minus the idle device's over the same time."""
    for reading in (*idle, *busy):
        if reading.power_source.startswith("battery") and reading.charging is not False:
            charging = reading.charging.reason if isinstance(reading.charging, Absent) else "it was charging"
            return Absent(f"{charging}: its battery's current is not what it used. Unplug it, adb over Wi-Fi")
    used = integral_mj(busy, start_s, end_s)
    if isinstance(used, Absent):
        return used
    if len(idle) < 2 or idle[-1].time_s <= idle[0].time_s:
        return Absent("the idle device's power was not measured")
    resting = integral_mj(idle, idle[0].time_s, idle[-1].time_s)
    if isinstance(resting, Absent):
        return resting
    if len(sources := sorted({reading.power_source for reading in (*idle, *busy)})) > 1:
        return Absent(f"its source changed meanwhile: {', '.join(sources)}")
    idle_mw = resting / (idle[-1].time_s - idle[0].time_s)
    above = (used - idle_mw * (end_s - start_s)) / 1000
    if above <= 0:
        return Absent(f"the device used no more than when idle ({idle_mw:.0f} mW): the sensor is too coarse")
    return Energy(above / answers, above / tokens, idle_mw / 1000, busy[0].power_source)


def first_throttled(readings: Sequence[Reading]) -> tuple[float, str] | None:
    """Device time and reason of the first reading at which the device was throttled, compared with the first of all."""
    for reading in readings:
        if why := reading.throttled(readings[0]):
            return reading.time_s, why
    return None


def sustained(ends: Sequence[tuple[float, int]], readings: Sequence[Reading]) -> dict[str, Any]:
    """Speed over a long run, and when it throttled.

    Args:
        ends: device time at which each answer ended, and its tokens.
        readings: of the sensors.
    Returns:
        {seconds, tok_s: tokens per second in each whole minute (or the whole run), last_over_first,
        first_throttled_s, because, highest_c}; null where there is nothing to say.
    """
    start, end = ends[0][0], ends[-1][0]
    minutes = max(1, int((end - start) // MINUTE))
    length = MINUTE if end - start >= MINUTE else end - start
    rates = []
    for minute in range(minutes):
        low = start + minute * length
        rates.append(sum(count for when, count in ends if low < when <= low + length) / length if length > 0 else 0.0)
    throttled = first_throttled(readings)
    known = [reading.deciding_c for reading in readings if not isinstance(reading.deciding_c, Absent)]
    return {
        "seconds": round(end - start, 1),
        "tok_s": rates,
        "last_over_first": rates[-1] / rates[0] if len(rates) > 1 and rates[0] > 0 else None,
        "first_throttled_s": None if throttled is None else round(throttled[0] - start, 1),
        "because": None if throttled is None else throttled[1],
        "highest_c": max(known, default=None),
    }
