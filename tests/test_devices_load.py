"""How busy a device was with other work: of the runner's processors, without the runner, or absent and why."""

from dataclasses import replace
from pathlib import Path

import pytest

from device_bench.devices import _watching
from device_bench.devices._requests import Reply, Results
from device_bench.devices._sensors import Sensors
from device_bench.devices._watching import Timing
from device_bench.run import silent
from device_bench.sensors import load
from device_bench.sensors.base import Absent
from device_bench.sensors.load import Ticks, others_share
from tests.test_devices_bench import Board, artifact, bench, board

__all__ = ["artifact", "board"]
START = Ticks({0: (100, 1000), 4: (200, 2000), 5: (300, 3000)}, 50)


@pytest.mark.parametrize(
    ("last", "share"),
    [
        (Ticks({0: (900, 2000), 4: (1200, 3000), 5: (1300, 4000)}, 1950), 0.05),  # processor 0 is not the runner's
        (Ticks({4: (1200, 3000), 5: (1300, 4000)}, 2060), 0.0),  # sampled: ten ticks more than the processors say
        (Ticks({4: (1200, 3000), 5: (1300, 4000)}, 3000), "do not fit together"),
        (Ticks({4: (1200, 3000)}, 1950), "processor 5 was switched on or off"),
        (Ticks({0: (900, 2000)}, 1950), "switched on or off"),
        (Ticks({4: (1200, 3000), 5: (1300, 4000)}, 10), "went backwards"),
        (Ticks({4: (100, 3000), 5: (1300, 4000)}, 60), "went backwards"),
        (Ticks({4: (300, 2100), 5: (400, 3100)}, 240), "less than two seconds"),
        (Ticks({4: (1200, 3000), 5: (1300, 4000)}, Absent("no line")), "no line"),
        (START, "less than two seconds"),
    ],
)
def test_others_are_what_the_runners_processors_did_besides(last: Ticks, share: float | str) -> None:
    found = others_share(START, last, [4, 5, 9])  # 9 is switched off
    unread = others_share(replace(START, cpus={}), replace(last, cpus={}), [4, 5])
    assert isinstance(unread, Absent)
    if isinstance(share, float):
        assert found == pytest.approx(share)
    else:
        assert isinstance(found, Absent) and share in found.reason


def said(busy: int, own: int, seconds: int) -> list[str]:
    """What the device prints after some seconds."""
    return [
        f"cpu0 0 0 0 {100 * seconds} 0 0 0 0 0 0",
        f"cpu7 {busy} 0 0 {100 * seconds - busy} 0 0 0 0 0 0",
        f"31 (x) S 1 1 1 0 -1 0 0 0 0 0 {own} 0 0 0 20 0 1 0 0 0 0 0 0 0",
    ]


def test_it_is_watched_from_the_first_answer_to_the_last(tmp_path: Path) -> None:
    watching = Timing(silent, "latency", 1, Sensors(False, str(tmp_path)))
    # Loading costs others 90 ticks, what comes after the last answer 80; between the two they use 6 of 300.
    for when, lines in enumerate(
        (said(0, 0, 0), said(90, 0, 1), said(180, 88, 2), said(386, 288, 4), said(466, 288, 5))
    ):
        watching.on_reading(100.0 + when, lines)
    results = Results(cpus="7", start_s=100.5)
    results.replies.append(Reply("a", [], 103.5, 1.0, 1, 1.0, []))
    assert watching.others_share(results) == pytest.approx((386 - 90 - 288) / 300)
    results.cpus = "x"
    assert isinstance(watching.others_share(results), Absent)


def test_a_device_says_how_busy_it_was_or_why_not(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "SHORTEST", 10)
    monkeypatch.setattr(_watching.Watching, "interval_s", 0.1)
    share = bench(artifact, min_seconds=1)["state"]["others_share"]
    assert share is not None and 0 <= share <= 1
    monkeypatch.setattr(_watching, "LOAD", "false")
    closed = bench(artifact, min_seconds=0.3)
    assert closed["state"]["others_share"] is None and closed["state"]["busy"] is None
    assert any("how busy other processes kept the machine is unknown: no line" in note for note in closed["notes"])
