"""What a reader of one device's measurements wants to know, and the devices side by side."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from device_bench.report import charts, timeline, wording
from device_bench.report.sources import Tree

Samples = dict[tuple[str, str], Tree]
Measured = tuple[Tree, Tree]  # an artifact and its bench
# Sample name in the samples file -> what its chart's axis says.
STRIPS = {
    "ttft_ms": "first token, ms",
    "decode_ms": "one decoded token, ms",
    "vision_ms": "vision tower and projector, ms",
    "load_ms": "load, ms",
}


@dataclass(frozen=True)
class DevicePage:
    """One device: its facts, a row per artifact, its charts, and the answers that are not the host's."""

    anchor: str
    title: str
    emulated: bool
    facts: list[tuple[str, str]]
    columns: list[tuple[str, str]]
    rows: list[tuple[Tree, str, list[str]]]  # artifact, name, a cell per column
    charts: list[Tree]
    flipped: list[tuple[str, Tree]]  # artifact and what `changed_answers` found between the host and this device


def device_pages(report: Tree, samples: Samples) -> list[DevicePage]:
    """A page for every device of every lab (a run folder is one), in the order of the report's benches.

    Args:
        report: from `build`.
        samples: raw samples by (run, file).
    """
    pages = []
    devices = _devices(report).values()
    for index, (measured, title) in enumerate(zip(devices, _titles(devices), strict=True)):
        artifact, bench = measured[0]
        device = bench["device"]
        anchor, several = f"device-{index + 1}", len({each["run"] for each in report["artifacts"]}) > 1
        lab = [("Measured in", artifact["run"])] if several else []
        columns, rows = _table(measured)
        compared = [
            (wording.display_name(artifact), (bench["host"] or {}).get("answers")) for artifact, bench in measured
        ]
        flipped = [(name, answers) for name, answers in compared if answers and answers["changed"]]
        facts = [*lab, *_facts(device), *_circumstances(bench.get("state") or {})]
        emulated, drawn = device.get("kind") == "emulated", _charts(anchor, measured, samples)
        pages.append(DevicePage(anchor, title, emulated, facts, columns, rows, drawn, flipped))
    return pages


def comparison(report: Tree) -> Tree | None:
    """Medians of every artifact on every real device; None where there are not two.

    Returns:
        {devices: titles, rows: [(artifact, name, [(decode, first token) or None per device])]}.
    """
    devices = {key: found for key, found in _devices(report).items() if found[0][1]["device"]["kind"] != "emulated"}
    if len(devices) < 2:
        return None
    rows: dict[str, tuple[Tree, list[Any]]] = {}
    for place, measured in enumerate(devices.values()):
        for artifact, bench in measured:
            _, cells = rows.setdefault(artifact["name"], (artifact, [None] * len(devices)))
            if bench["valid"] and bench["decode_tok_s"]:
                rate, first = (wording.number(bench[key]["p50"]) for key in ("decode_tok_s", "ttft_ms"))
                cells[place] = rate, first
    titles = _titles(devices.values())
    table = [(artifact, wording.display_name(artifact), cells) for artifact, cells in rows.values()]
    return {"devices": titles, "rows": table}


def _devices(report: Tree) -> dict[tuple[Any, ...], list[Measured]]:
    found: dict[tuple[Any, ...], list[Measured]] = {}
    for artifact in report["artifacts"]:
        for bench in artifact["benches"]:
            device = bench["device"]
            key = (artifact["run"], *(device.get(name) for name in ("kind", "name", "soc", "os", "id")))
            found.setdefault(key, []).append((artifact, bench))
    return found


def _titles(measured: Iterable[list[Measured]]) -> list[str]:
    """Names of the devices; where two of a lab have the same, with their ids."""
    devices = [(found[0][0]["run"], found[0][1]["device"]) for found in measured]
    names = [(run, str(device.get("name") or device.get("kind"))) for run, device in devices]
    return [
        f"{name[1]} ({device['id']})" if names.count(name) > 1 and device.get("id") else name[1]
        for name, (_, device) in zip(names, devices, strict=True)
    ]


def _facts(device: Tree) -> list[tuple[str, str]]:
    memory = device.get("memory_mb")
    cpus = ", ".join(str(part) for part in (device.get("cpus"), device.get("arch")) if part)
    found = {
        "Kind": device.get("kind"),
        "SoC": device.get("soc"),
        "Processors": cpus,
        "Memory": f"{wording.number(memory)} MiB" if memory else None,
        "System": ", ".join(part for part in (device.get("os"), device.get("kernel")) if part),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _circumstances(state: Tree) -> list[tuple[str, str]]:
    """What the device's state was when the latency pass began."""
    before, gate = state.get("before") or {}, state.get("gate") or {}
    clocks, heat = before.get("frequency_mhz"), before.get("temperature_c")
    battery, others = before.get("battery_percent"), state.get("others_share")
    found = {
        "Governor": before.get("governor"),
        "Clocks": f"{wording.number(min(clocks))} to {wording.number(max(clocks))} MHz" if clocks else None,
        "Pinned to": ", ".join(map(str, state.get("processors") or [])),
        "Power mode": before.get("power_mode"),
        "Temperature": f"{max(heat.values()):.1f} °C, the hottest of {len(heat)}" if heat else None,
        "Cooled down": f"{wording.duration(gate['waited_s'])}" if gate.get("waited_s", 0) >= 1 else None,
        "Other work": f"{others:.1%} of the processors' time" if others is not None else None,
        "Battery": f"{battery} %, {before.get('battery_status')}" if battery is not None else None,
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _median(key: str) -> Callable[[Tree], str | None]:
    return lambda bench: wording.number(bench[key]["p50"]) if bench[key] else None


def _energy(key: str, factor: float) -> Callable[[Tree], str | None]:
    def show(bench: Tree) -> str | None:
        joules = (bench["energy_j"] or {}).get(key)
        return None if joules is None else wording.number(factor * joules)

    return show


def _sustained(bench: Tree) -> Tree:
    found: Tree = (bench["thermal"] or {}).get("sustained") or {}
    return found


def _slope(bench: Tree) -> str | None:
    rates = _sustained(bench).get("tok_s") or []
    return f"{wording.number(rates[0])} → {wording.number(rates[-1])}" if len(rates) > 1 else None


def _throttled(bench: Tree) -> str | None:
    if not (found := _sustained(bench)):
        return None
    seconds = found["first_throttled_s"]
    return "never" if seconds is None else wording.duration(seconds)


def _hottest(bench: Tree) -> str | None:
    degrees = _sustained(bench).get("highest_c")
    return None if degrees is None else f"{degrees:.1f}"


def _score(accuracy: Tree | None) -> str | None:
    return wording.percent(accuracy["score"]) if accuracy else None


def _others(bench: Tree) -> str | None:
    answers = (bench["host"] or {}).get("answers")
    return f"{answers['changed']} of {answers['compared']}" if answers else None


COLUMNS: dict[tuple[str, str], Callable[[Tree], str | None]] = {
    ("First token", "ms"): _median("ttft_ms"),
    ("Decode", "tokens/s"): _median("decode_tok_s"),
    ("Energy", "J per answer"): _energy("value", 1),
    ("Energy", "mJ per token"): _energy("per_token_j", 1000),
    ("PSS", "MiB"): lambda bench: wording.number(bench["pss_mb"]) if bench.get("pss_mb") else None,
    ("Sustained", "tokens/s, first and last minute"): _slope,
    ("Throttled", "after"): _throttled,
    ("Hottest", "°C"): _hottest,
    ("Accuracy", "%"): lambda bench: _score((bench["accuracy"] or {}).get("avg")),
    ("The host's", "%"): lambda bench: _score((bench["host"] or {}).get("accuracy")),
    ("Other answers", "than the host's"): _others,
}


def _table(measured: Sequence[Measured]) -> tuple[list[tuple[str, str]], list[tuple[Tree, str, list[str]]]]:
    """Columns of which some artifact has a value, and the rows."""
    usable = [bench for _, bench in measured if bench["valid"]]
    columns = {head: show for head, show in COLUMNS.items() if any(show(bench) for bench in usable)}
    rows = []
    for artifact, bench in measured:
        cells = [(bench["valid"] and show(bench)) or "n/a" for show in columns.values()]
        rows.append((artifact, wording.display_name(artifact), cells))
    return list(columns), rows


def _charts(anchor: str, measured: Sequence[Measured], samples: Samples) -> list[Tree]:
    """Distributions of the latencies, and what happened over the time of the sustained run."""
    raw = [
        (artifact, wording.display_name(artifact), each)
        for artifact, bench in measured
        if bench["valid"] and (each := samples.get((artifact["run"], bench["samples"])))
    ]
    found: list[Tree] = []
    for name, label in STRIPS.items():
        if rows := [(artifact, title, each[name]) for artifact, title, each in raw if each.get(name)]:
            strip = charts.latency_strip(f"{anchor}-{name}", rows, label)
            found.append(_chart(label.partition(",")[0].capitalize(), strip))
    for name, (title, label, read) in timeline.LINES.items():
        if lines := [(artifact, who, line) for artifact, who, each in raw if len(line := read(each)) > 1]:
            found.append(_chart(title, timeline.lines(f"{anchor}-{name}", lines, label)))
    return found


def _chart(title: str, svg: Markup) -> Tree:
    return {"title": title, "svg": svg, "text": "", "legend": False}
