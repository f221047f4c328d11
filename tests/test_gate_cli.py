"""`pocketvlm gate` writes what was asked for, updates baselines, says what it sees, and names what it cannot read."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import Result
from typer.testing import CliRunner

from device_bench.gate import gate
from device_bench.judge import Allowances
from pocketvlm.cli import app
from tests.test_gate import dropped, report, with_student
from vlm.errors import UserError


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["gate", *map(str, arguments)])


@pytest.fixture
def reports(tmp_path: Path) -> tuple[Path, Path]:
    """The better and the worse of two reports."""
    before, after = dropped(1, 2.0)
    better, worse = (with_student(report(tmp_path / name, r), r) for name, r in (("a", before), ("b", after)))
    return better, worse


def test_every_output_holds_the_verdict(reports: tuple[Path, Path], tmp_path: Path) -> None:
    better, worse = reports
    files = {kind: tmp_path / "deep" / f"gate.{kind}" for kind in ("markdown", "html", "junit")}
    done = call(
        worse, "--baseline", better, "--json", *(x for kind, file in files.items() for x in (f"--{kind}", file))
    )
    assert done.exit_code == 1
    record = json.loads(done.stdout)
    assert record["verdict"] == "regression" and record["flipped"]["student"]["lost"] > 60
    assert files["markdown"].read_text().startswith("### Gate: regression")
    assert "flipped answers" in files["html"].read_text()
    assert ElementTree.parse(files["junit"]).getroot().get("failures") != "0"


def test_update_shows_the_difference_and_writes_the_baseline(reports: tuple[Path, Path], tmp_path: Path) -> None:
    better, worse = reports
    baseline = tmp_path / "baselines" / "x.json"
    assert call(better, "--baseline", baseline, "--update").exit_code == 0
    assert "credits" in baseline.read_text()
    shown = call(worse, "--baseline", baseline, "--update")
    assert shown.exit_code == 0 and "Gate: regression" in shown.stdout
    assert call(worse, "--baseline", baseline).exit_code == 0, "the worse one is the baseline now"


def test_power_says_where_the_gate_would_let_the_drop_pass() -> None:
    assert "lets the average lose 1 points" in call("--power", 0.5).stdout
    assert "lets the average" not in call("--power", 2).stdout


def test_power_needs_two_reports_or_none(reports: tuple[Path, Path]) -> None:
    table = json.loads(call("--power", 2, "--json").stdout)["needed"]
    assert table["0.02"] < table["0.1"] < 3000
    seen = json.loads(call(reports[1], "--baseline", reports[0], "--power", 2, "--json").stdout)["comparisons"]
    assert {row["what"] for row in seen} == {"student", "onnx-int4 on box"}
    assert all(1 < row["sees"] < 2 and row["needed"] < 3000 for row in seen)
    assert isinstance(call(reports[1], "--power", 2).exception, UserError)
    assert isinstance(call(reports[1]).exception, UserError)


@pytest.mark.parametrize(
    ("artifact", "lacking"), [({"x": 1}, "format and precision"), ({"name": "a"}, "benches"), (3, "name")]
)
def test_a_report_that_lacks_a_part_is_the_users_to_change(tmp_path: Path, artifact: Any, lacking: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"schema": 1, "artifacts": [artifact]}))
    with pytest.raises(UserError, match=rf"x\.json: artifact 1 has no .*{lacking}"):
        gate(path, path, Allowances())


def test_a_run_folder_stands_for_its_report(tmp_path: Path) -> None:
    report(tmp_path / "a")
    assert gate(tmp_path / "a", tmp_path / "a" / "report", Allowances()).exit_code == 0
