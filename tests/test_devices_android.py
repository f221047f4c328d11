"""What Android's services add to a bench: a runner's proportional memory, and energy where nothing measures it."""

from pathlib import Path

import pytest

from device_bench.devices._estimate import Used, estimate
from device_bench.devices._sensors import Sensors
from device_bench.devices._survey import survey
from device_bench.sensors.base import Absent
from device_bench.telemetry import Identity
from tests.test_devices_bench import Board, artifact, bench, board

__all__ = ["artifact", "board"]

SHELL = 2000
THERMAL = """Thermal Status: 0
HAL Ready: true
Current temperatures from HAL:
\tTemperature{mValue=31.5, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: false
  level: 80
  voltage: 4000
  temperature: 312
"""
# Every time somebody asks, our user has used one mAh more.
DUMPSYS = """#!/bin/sh
cd {folder}
case $1 in
batterystats)
echo x >>asked
echo "  Estimated power use (mAh):"
echo "    Capacity: 4000, Computed drain: 9, actual drain: 8"
echo "    Uid {user}: $(wc -l <asked).5 ( cpu=1 )"
echo "    Uid 7: 99 ( cpu=99 )"
echo;;
meminfo) printf '** MEMINFO in pid %s [runner] **\\n App Summary\\n TOTAL PSS: 20480 TOTAL RSS: 30720\\n' $2;;
*) cat $1 2>/dev/null;;
esac
"""


def be(board: Board, user: int) -> None:
    """Whose processes adb starts."""
    program = board.folder / "services" / "id"
    program.write_text(f"#!/bin/sh\necho {user}\n")
    program.chmod(0o755)


@pytest.fixture
def phone(board: Board, monkeypatch: pytest.MonkeyPatch) -> Board:
    """The board as a phone with Android's services, without a readable sensor in /sys."""
    services = board.folder / "services"
    services.mkdir()
    (services / "thermalservice").write_text(THERMAL)
    (services / "battery").write_text(BATTERY)
    (services / "dumpsys").write_text(DUMPSYS.format(folder=services, user=SHELL))
    (services / "dumpsys").chmod(0o755)
    be(board, SHELL)
    monkeypatch.setenv("PATH", str(services), prepend=":")
    monkeypatch.setattr(board, "android", True)
    board.kind = "phone"
    board.sensors = Sensors(True, str(board.folder / "none"))
    board.sensors.locate(board.link)
    return board


def test_the_memory_pass_of_a_phone_has_its_runners_pss(phone: Board, artifact: Path) -> None:
    result = bench(artifact)
    assert result["valid"] is True and (result["peak_rss_mb"], result["pss_mb"]) == (20.0, 20.0)


def test_pss_is_absent_with_the_reason_where_meminfo_does_not_know_the_runner(phone: Board, artifact: Path) -> None:
    shim = phone.folder / "services" / "dumpsys"
    shim.write_text(shim.read_text().replace("** MEMINFO", "No process found"))
    result = bench(artifact)
    assert result["pss_mb"] is None and "MEMINFO" in result["reasons"]["pss_mb"] and result["peak_rss_mb"] == 20.0


def test_a_board_has_no_pss_and_says_why(board: Board, artifact: Path) -> None:
    assert "only Android" in bench(artifact)["reasons"]["pss_mb"]


def test_energy_that_nothing_measures_is_estimated_and_called_so(phone: Board, artifact: Path) -> None:
    result = bench(artifact)
    found = result["energy_j"]
    assert found["source"] == f"batterystats: Android's model of what user {SHELL} used, not a measurement"
    answers = result["ttft_ms"]["n"]
    assert 0 < found["value"] <= 3.6 * 4 / answers and found["idle_w"] is None
    assert found["per_token_j"] == pytest.approx(found["value"] / 5)


def test_what_root_used_is_no_estimate(phone: Board, artifact: Path) -> None:
    be(phone, 0)
    result = bench(artifact)
    assert result["energy_j"] is None and "the whole system's: adb unroot" in result["reasons"]["energy_j"]


def test_an_estimate_needs_a_battery_that_was_used() -> None:
    first, later = (Used("2000", mah, 4000.0) for mah in (10.0, 10.5))
    found = estimate(first, later, answers=10, tokens=100)
    assert not isinstance(found, Absent) and found.per_answer_j == pytest.approx(0.5 * 3.6 * 4 / 10)
    for before, after, reason in (
        (first, first, "counted nothing"),
        (later, first, "counted nothing"),
        (Used("2000", Absent("nothing of user 2000"), 4000.0), later, "nothing of user 2000"),
        (first, Used("2000", 11.0, Absent("no voltage")), "no voltage"),
    ):
        absent = estimate(before, after, 10, 100)
        assert isinstance(absent, Absent) and reason in absent.reason


def test_the_doctor_names_the_estimate_and_both_kinds_of_memory(phone: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Identity(kind="phone", name="p", soc=None, os=None, arch="arm64-v8a")
    monkeypatch.setattr(phone, "look", lambda: look)
    found = survey(phone)
    assert found["energy"] == "batterystats: an estimate of Android's model"
    assert found["memory"] == "peak RSS and PSS" and found["cool-down"] == "31.5 degrees now, at most 37 wanted"
