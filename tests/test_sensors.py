"""Every variant of what phones and boards print is read to its value or to none, and no text makes a parser stumble."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_bench.sensors import battery, cpus, energy, jetson, load, memory, properties, tegrastats, thermal
from device_bench.sensors.base import Absent

FIXTURES = Path(__file__).parent / "fixtures" / "sensors"
VARIANTS = sorted(FIXTURES.glob("*/*.txt"))


def plain(value: object) -> Any:
    """A parser's result as JSON would have it, absent readings as None."""
    if isinstance(value, Absent):
        assert value.reason
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_cpus(text: str) -> dict[str, Any]:
    clocks = cpus.cpus(text)
    each = {str(cpu): list(plain(clock).values()) for cpu, clock in clocks.items()}
    return {"big": plain(cpus.big_cluster(clocks)), "cpus": list(clocks), **each}


def read_meter(text: str) -> dict[str, Any]:
    found = energy.meter(text)
    rails = plain(found.rails)
    return {
        "elapsed_ms": plain(found.elapsed_ms),
        "rails": rails and {name: list(rail.values()) for name, rail in rails.items()},
    }


def read_tegra(text: str) -> dict[str, Any]:
    found = tegrastats.tegra(text)
    power = plain(found.power)
    ram = [plain(found.ram_used_mb), plain(found.ram_total_mb)]
    return {**plain(found), "ram": ram, "power": power and list(power.values())}


def read_load(text: str) -> dict[str, Any]:
    found = load.ticks(text)
    return {"cpus": {str(cpu): list(ticks) for cpu, ticks in found.cpus.items()}, "own": plain(found.own)}


PARSERS: dict[str, Callable[[str], Any]] = {
    "getprop": lambda text: plain(properties.identity(text)),
    "thermalservice": lambda text: plain(thermal.thermal(text)),
    "battery": lambda text: plain(battery.battery(text)),
    "batterystats": lambda text: plain(battery.power_use(text)),
    "meminfo": lambda text: {"total_pss_kib": plain(memory.total_pss_kib(text))},
    "power": read_meter,
    "odpm": lambda text: plain(energy.odpm(text)),
    "rails": lambda text: plain(energy.enabled_rails(text)),
    "cpufreq": read_cpus,
    "tegrastats": read_tegra,
    "nvpmodel": lambda text: plain(jetson.power_mode(text)),
    "clocks": lambda text: plain(jetson.clocks_fixed(text)),
    "hwmon": lambda text: plain(jetson.hwmon_rails(text)),
    "iio": lambda text: plain(jetson.iio_rails(text)),
    "allowed": lambda text: plain(cpus.allowed(text)),
    "load": read_load,
    "status": lambda text: plain(memory.kibibytes(text, "VmHWM")),
}


def sections(path: Path) -> dict[str, str]:
    parts = re.split(r"^##### (\w+)\n", path.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def reads(found: Any, wanted: Any) -> None:
    """Whether what was found has all that is wanted; mappings may hold more on their first level."""
    if isinstance(wanted, dict):
        assert {key: found.get(key, "missing") for key in wanted} == wanted
    else:
        assert found == wanted


def test_there_are_at_least_twelve_android_and_ten_jetson_variants() -> None:
    kinds = [path.parent.name for path in VARIANTS]
    assert kinds.count("android") >= 12 and kinds.count("jetson") >= 10


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_variant_is_read_to_its_values_and_to_no_others(path: Path, ending: str) -> None:
    said = sections(path)
    expected = json.loads(said.pop("expected"))
    assert expected.keys() == said.keys()
    for name, text in said.items():
        reads(PARSERS[name](text.replace("\n", ending)), expected[name])


LINES = {
    name: sorted({line for path in VARIANTS for line in sections(path).get(name, "").splitlines()}) for name in PARSERS
}
EVERYTHING = sorted({line for lines in LINES.values() for line in lines})


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_text_makes_a_parser_raise(name: str, data: st.DataObject) -> None:
    line = st.one_of(st.sampled_from(LINES[name] or EVERYTHING), st.sampled_from(EVERYTHING), st.text(max_size=60))
    text = "\n".join(data.draw(st.lists(line, max_size=25)))
    cut = data.draw(st.integers(0, len(text)))
    PARSERS[name](text)
    PARSERS[name](text[:cut])


def numbers(value: Any) -> list[float]:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return []
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    return [number for item in value for number in numbers(item)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_foreign_lines_bring_no_number_of_theirs(path: Path, data: st.DataObject) -> None:
    """Lines of every other kind of output are strewn in; a reading may get lost, but must not become another one."""
    said = sections(path)
    said.pop("expected")
    for name, text in said.items():
        if name == "tegrastats":  # one line, parsed as one
            continue
        foreign = st.text(alphabet=" :=,@%/[]{}()abcxyzTC0123456789.-", max_size=40).map(lambda words: words + "q")
        lines = text.splitlines()
        for _ in range(data.draw(st.integers(1, 6))):
            lines.insert(data.draw(st.integers(0, len(lines))), data.draw(foreign))
        before = numbers(PARSERS[name](text))
        assert set(numbers(PARSERS[name]("\n".join(lines)))) <= set(before) | set(numbers(less(name, text, before)))


def less(name: str, text: str, before: list[float]) -> list[float]:
    """Readings of the text cut off after each of its lines: what a foreign line that ends a block may leave."""
    lines = text.splitlines()
    return [n for end in range(len(lines)) for n in numbers(PARSERS[name]("\n".join(lines[:end])))]


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("jetson/*.txt")), ids=lambda path: path.stem)
def test_a_tegrastats_line_that_was_cut_short_gives_no_other_numbers(path: Path) -> None:
    line = sections(path)["tegrastats"].strip()
    whole = plain(tegrastats.tegra(line))
    for end in range(len(line)):
        if line[end] != " ":
            continue
        found = plain(tegrastats.tegra(line[:end]))
        for name in ("ram_used_mb", "ram_total_mb", "cpus", "gpu_percent", "gpu_mhz", "emc_percent"):
            assert found[name] in (None, whole[name])
        assert found["temperatures_c"].items() <= whole["temperatures_c"].items()
        assert found["rails_mw"].items() <= whole["rails_mw"].items()


def test_processors_are_read_from_the_kernels_lists_and_written_as_taskset_wants_them() -> None:
    assert cpus.cpu_list("0-3,7") == [0, 1, 2, 3, 7]
    assert cpus.mask([4, 5, 6, 7]) == "f0"
    assert cpus.allowed("Name:\tx\nCpus_allowed:\tf0\nCpus_allowed_list:\t4-7\n") == [4, 5, 6, 7]
    for text in ("", "3-1", "1,,2", "0-99999", "a"):
        assert isinstance(cpus.cpu_list(text), Absent)


def test_memory_is_read_by_the_whole_name_of_its_line() -> None:
    status = "VmHWMx:\t1 kB\nVmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n"
    assert memory.kibibytes(status, "VmHWM") == 2048
    assert isinstance(memory.kibibytes(status, "VmPeak"), Absent)
    assert isinstance(memory.kibibytes("VmHWM: 1 kB\nVmHWM: 2 kB", "VmHWM"), Absent)
    two = (
        "** MEMINFO in pid 1 [a] **\n App Summary\n TOTAL PSS: 10\n** MEMINFO in pid 2 [b] **\n App Summary\n TOTAL: 20"
    )
    assert memory.total_pss_kib(two, 2) == 20
    unread = "** MEMINFO in pid 1 [a] **\n App Summary\n TOTAL PSS: 0 TOTAL RSS: 0\n"
    assert isinstance(memory.total_pss_kib(unread), Absent)


@pytest.mark.parametrize(
    ("line", "power"),
    [
        ("VDD_GPU -12mW/3mW VDD_CPU_SOC_MSS 4205mW/4165mW VIN_SYS_5V0 4206mW/4126mW", 8399),
        ("VDD_GPU -1200mW/3mW VDD_CPU_SOC_MSS 4205mW/4165mW VIN_SYS_5V0 4206mW/4126mW", None),
        ("VDD_GPU -12mW/3mW VDD_CPU_SOC_MSS -4mW/4165mW VIN_SYS_5V0 3mW/4126mW", None),
        ("VDD_IN 4021mW/3900mW VDD_CPU_GPU_CV -8mW/0mW", 4021),
        ("VDD_IN -4mW/3900mW VDD_CPU_GPU_CV 500mW/0mW", None),
        ("VDD_IN 0mW/0mW", None),
    ],
)
def test_a_rail_that_feeds_nothing_may_be_a_little_below_zero_a_module_never(line: str, power: float | None) -> None:
    found = tegrastats.tegra(line).power
    assert (None if isinstance(found, Absent) else found.milliwatts) == power
