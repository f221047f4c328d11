"""What a device did over time: speed, temperature and power during the sustained run, else during the latency pass."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from device_bench.report.sources import Tree
from device_bench.report.svg import colour_of, drawing

Line = list[tuple[float, float]]  # minutes since the first point, value
BIN_S = 10.0
HEIGHT = 220


def speed(samples: Tree) -> Line:
    """Tokens per second in every ten seconds of the sustained run."""
    ends = (samples.get("sustained") or {}).get("ends") or []
    if len(ends) < 2:
        return []
    start = ends[0][0]
    counts: dict[int, int] = {}
    for when, tokens in ends[1:]:
        place = int((when - start) // BIN_S)
        counts[place] = counts.get(place, 0) + tokens
    whole = int((ends[-1][0] - start) // BIN_S)
    return [((place + 0.5) * BIN_S / 60, counts.get(place, 0) / BIN_S) for place in range(whole)]


def temperature(samples: Tree) -> Line:
    """The temperature that the thermal gate looks at, in degrees Celsius."""
    return _readings(samples, "deciding_c", 1)


def power(samples: Tree) -> Line:
    """Power in watts, where a sensor gave it."""
    return _readings(samples, "power_mw", 1000)


LINES: dict[str, tuple[str, str, Callable[[Tree], Line]]] = {
    "speed": ("Speed without a pause", "tokens/s", speed),
    "temperature": ("Temperature", "°C", temperature),
    "power": ("Power", "W", power),
}


def _readings(samples: Tree, key: str, divisor: float) -> Line:
    rows = (samples.get("sustained") or samples).get("telemetry") or []
    known = [(row["time_s"], row[key] / divisor) for row in rows if row.get(key) is not None]
    return [((when - known[0][0]) / 60, value) for when, value in known]


def lines(name: str, drawn: Sequence[tuple[Tree, str, Line]], y_label: str) -> Markup:
    """One line per artifact over the minutes."""
    with drawing(name, f"{y_label} over time, a line per artifact", HEIGHT) as chart:
        axes = chart.axes
        dashes = ["-", (0, (4, 2)), (0, (1, 1))]
        seen: dict[str, int] = {}
        for artifact, title, line in drawn:
            colour = colour_of(artifact["format"])
            style = dashes[seen.get(colour, 0) % len(dashes)]
            seen[colour] = seen.get(colour, 0) + 1
            minutes, values = zip(*line, strict=True)
            axes.plot(minutes, values, color=colour, linestyle=style, label=title, linewidth=1.4)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.margins(x=0.02, y=0.15)
        axes.set_xlabel("minutes")
        axes.set_ylabel(y_label)
        axes.legend(loc="best", handlelength=2)
    return chart.svg
