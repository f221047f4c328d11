"""What surrounds the long passes on a device: they begin cool, and the time floor counts timed answers alone."""

from pathlib import Path
from typing import Any

import pytest

from device_bench.devices import _rules
from device_bench.devices._process import Interrupted
from tests.test_devices_bench import Board, artifact, bench, board
from vlm.errors import CheckFailed

__all__ = ["artifact", "board"]


def test_a_sustained_run_on_a_device_that_stays_hot_is_invalid(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench(artifact, sustained_s=0.1)["thermal"]["sustained"]["gate"]["problem"] is None
    answer = board.answer

    def heating(job: Any, *words: Any) -> Any:
        results = answer(job, *words)
        board.write("class/thermal/thermal_zone0/temp", 70000)
        return results

    monkeypatch.setattr(board, "answer", heating)
    monkeypatch.setattr("device_bench.devices._rules.cool_down", at_first_cool())
    with pytest.raises(CheckFailed, match=r"before the sustained run: 70\.0 degrees found, at most 60 wanted"):
        bench(artifact, sustained_s=0.1)


@pytest.mark.parametrize("kind", ["latency", "sustained"])
def test_a_timed_pass_that_a_restart_cut_short_begins_anew_with_its_cool_down(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    happened: list[str] = []
    once, cool = board._run_once, _rules.cool_down

    def restarting(job: Any, *words: Any) -> None:
        if job.kind == kind:
            happened.append(kind)
        if happened.count(kind) == 1 and job.kind == kind:
            raise Interrupted
        once(job, *words)

    def gate(*words: Any, **more: Any) -> Any:
        happened.append("gate")
        return cool(*words, **more)

    monkeypatch.setattr(board, "_run_once", restarting)
    monkeypatch.setattr(_rules, "cool_down", gate)
    result = bench(artifact, sustained_s=0.1)
    first = happened.index(kind)
    assert result["valid"] is True and happened[first - 1 : first + 3] == ["gate", kind, "gate", kind]


def at_first_cool() -> Any:
    """The gate, passed the first time whatever the device's heat is."""
    from device_bench.devices._method import Gate, cool_down

    gates: list[Gate] = []

    def gate(*words: Any, **more: Any) -> Gate:
        gates.append(cool_down(*words, **more) if gates else Gate(0.0, None, None, None))
        return gates[-1]

    return gate


def test_the_time_floor_begins_after_the_warm_up(board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    answer = board.answer

    def noting(job: Any, settings: dict[str, Any], *rest: Any) -> Any:
        asked.append(settings)
        return answer(job, settings, *rest)

    monkeypatch.setattr(board, "answer", noting)
    bench(artifact, warmup=2, min_seconds=0.2)
    assert [found["repeat_from"] for found in asked if found.get("repeat_from")] == [6]
