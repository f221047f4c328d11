"""How far two measurements of one artifact lie apart, and what reading the sensors costs:
`python -m benchmarks.measuring_noise ARTIFACT...`

Noise: `pocketvlm bench` measures every artifact twice per pair, the artifacts in turn, so that the two runs of a pair
are as far apart as two benches. Telemetry: the processor time of the loop that reads a board's sensors once a second,
and the decode rate with that loop against without it, in turn. The sensors are files as a Jetson Orin has them: this
machine may have none. What a phone's dumpsys costs can only be measured on a phone.
Exit code 1 where fewer than nine of ten pairs lie within 3 %, or telemetry takes more than 1 % of a processor.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from device_bench.config import BenchConfig
from device_bench.devices._link import Link, quote
from device_bench.devices._sensors import Sensors
from device_bench.devices._watching import LOAD
from device_bench.run import bench_one
from device_bench.sensors.cpus import FILES as CLOCKS

WITHIN = 3.0  # percent
SHARE = 0.9  # of the pairs
TELEMETRY = 1.0  # percent of one processor


class Here(Link):
    """This machine's shell, as a device's."""

    spec = "here"

    def check(self) -> None:
        """It always answers."""

    def command(self, script: str) -> list[str]:
        """Run by sh."""
        return ["sh", "-c", script]

    def send(self, file: Path, to: str, timeout_s: float) -> None:
        """Copy."""
        shutil.copy(file, to)

    def fetch(self, file: str, to: Path, timeout_s: float) -> None:
        """Copy."""
        shutil.copy(file, to)


def measure(artifact: Path, out: Path, seconds: float, threads: int) -> dict[str, Any]:
    """One bench of speed alone; its result."""
    config = BenchConfig(tasks=[], cold_loads=1, min_seconds=seconds, threads=threads)
    result: dict[str, Any] = json.loads(bench_one(artifact, config, out).read_text())
    return result


def board(system: Path) -> None:
    """Write a /sys of eight processors, nine thermal zones and three rails."""
    files: dict[str, object] = {"class/hwmon/hwmon0/name": "ina3221"}
    files |= {f"devices/system/cpu/cpu{cpu}/cpufreq/{name}": 2_201_600 for cpu in range(8) for name in CLOCKS}
    for zone in range(9):
        place = f"class/thermal/thermal_zone{zone}"
        files |= {f"{place}/type": "cpu-thermal", f"{place}/temp": 45_000}
    for rail, label in enumerate(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), start=1):
        place = "class/hwmon/hwmon0"
        files |= {f"{place}/in{rail}_label": label, f"{place}/in{rail}_input": 5000, f"{place}/curr{rail}_input": 800}
    for name, value in files.items():
        (system / name).parent.mkdir(parents=True, exist_ok=True)
        (system / name).write_text(f"{value}\n")


@contextmanager
def telemetry(system: Path, interval_s: float = 1.0) -> Iterator[dict[str, float]]:
    """Read the sensors once per interval meanwhile; afterwards the dictionary holds what that cost in percent."""
    sensors, link, found = Sensors(android=False, system=str(system)), Here(), {"percent": 0.0}
    sensors.locate(link)
    reading = f"cat /proc/uptime; {LOAD}; {sensors.script}; sleep {interval_s}"
    script = f"cd {quote(str(system))}; echo $$ >runner; while :; do {reading}; done"
    before, start = children_s(), time.monotonic()
    reader = subprocess.Popen(link.command(script), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield found
    finally:
        os.killpg(reader.pid, 9)
        reader.wait()
    found["percent"] = 100 * (children_s() - before) / (time.monotonic() - start)


def children_s() -> float:
    """Processor seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def noise(artifacts: list[Path], out: Path, pairs: int, seconds: float, threads: int) -> bool:
    """Print the differences of all pairs; whether enough of them are small."""
    runs: dict[str, list[dict[str, Any]]] = {artifact.name: [] for artifact in artifacts}
    for number in range(2 * pairs):
        for artifact in artifacts:
            result = measure(artifact, out, seconds, threads)
            runs[artifact.name].append(result)
            print(f"run {number + 1} {artifact.name}: {_told(result)}", flush=True)
    small = judged = 0
    for name, results in runs.items():
        apart = [_apart(a, b) for a, b in zip(results[::2], results[1::2], strict=True)]
        small += sum(each <= WITHIN for each in apart if each is not None)
        judged += sum(each is not None for each in apart)
        listed = ", ".join("void" if each is None else f"{each:.1f}" for each in apart)
        print(f"{name}: pairs apart by {listed} %")
    count = pairs * len(artifacts)
    void = f"; {count - judged} void, as the machine was busy" if judged < count else ""
    print(f"{small} of {judged} pairs within {WITHIN:g} %{void}")
    return judged > count / 2 and small >= SHARE * judged


def _apart(one: dict[str, Any], other: dict[str, Any]) -> float | None:
    """How far two runs' medians lie apart in percent; None where one says that the machine was busy."""
    if one["state"]["busy"] or other["state"]["busy"]:
        return None
    rates = one["decode_tok_s"]["p50"], other["decode_tok_s"]["p50"]
    return 100 * (max(rates) / min(rates) - 1)


def _told(result: dict[str, Any]) -> str:
    rate, others = result["decode_tok_s"], result["state"]["others_share"] or 0.0
    busy = "; the machine was busy" if result["state"]["busy"] else ""
    return f"{rate['p50']:,.0f} tokens/s in {rate['n']} answers; others used {others:.1%} of the CPUs{busy}"


def overhead(artifact: Path, out: Path, pairs: int, seconds: float, threads: int) -> bool:
    """Print what telemetry costs; whether that is little enough."""
    board(system := out / "sys")
    with telemetry(system) as alone:
        time.sleep(10 * seconds)
    ratios = []
    for _ in range(pairs):
        without = measure(artifact, out, seconds, threads)["decode_tok_s"]["p50"]
        with telemetry(system):
            ratios.append(measure(artifact, out, seconds, threads)["decode_tok_s"]["p50"] / without)
    change = 100 * (statistics.median(ratios) - 1)
    print(f"telemetry: {alone['percent']:.2f} % of one processor; decode rate {change:+.1f} % (median of {pairs})")
    return alone["percent"] <= TELEMETRY


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=BenchConfig().min_seconds, help="at least so long a run")
    parser.add_argument("--threads", type=int, default=BenchConfig().threads)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        arguments = Path(out), options.pairs, options.seconds, options.threads
        quiet = noise(options.artifacts, *arguments)
        cheap = overhead(options.artifacts[0], *arguments)
    sys.exit(0 if quiet and cheap else 1)


if __name__ == "__main__":
    main()
