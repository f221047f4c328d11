"""A baseline from a busy machine, whose speeds are upper bounds, hides no slowdown: nothing is a pass against it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from device_bench.baseline import slim
from device_bench.gate import gate, read_report
from device_bench.judge import Allowances
from pocketvlm.cli import app
from tests.test_gate import report, stats

BUSY = {"busy": "the machine was busy", "before": {}}


@pytest.mark.parametrize("kept", [False, True], ids=["report", "baseline"])
def test_against_a_busy_baseline_no_speed_is_a_pass_and_a_slowdown_still_a_regression(
    tmp_path: Path, kept: bool
) -> None:
    old = report(tmp_path / "a", state=BUSY)
    if kept:
        old.write_text(json.dumps(slim(*read_report(old))))
    equal = gate(report(tmp_path / "b"), old, Allowances())
    assert equal.exit_code == 2 and len(equal.reasons) == 4
    assert all("of the baseline: the machine was busy. Measure the baseline anew" in why for why in equal.reasons)
    slower = gate(report(tmp_path / "c", ttft_ms=stats(20.0)), old, Allowances())
    assert slower.exit_code == 1 and "ttft_ms +100 % slower" in slower.reasons[0]
    both = gate(report(tmp_path / "d", ttft_ms=stats(20.0), state=BUSY), old, Allowances())
    assert both.exit_code == 2
    assert gate(report(tmp_path / "e"), old, Allowances(ignore=["latency"])).exit_code == 0


@pytest.mark.parametrize("state", [BUSY, {"busy": None}], ids=["busy", "idle"])
def test_a_busy_run_that_is_made_the_baseline_says_so(tmp_path: Path, state: dict[str, object]) -> None:
    new, baseline = report(tmp_path / "a", state=state), tmp_path / "tiny.json"
    done = CliRunner().invoke(app, ["gate", str(new), "--baseline", str(baseline), "--update"])
    assert done.exit_code == 0 and baseline.is_file()
    assert ("The machine was busy while onnx-int4 were timed" in done.output) == bool(state["busy"])
