"""The report shows the gate's verdict on its own results, and judges a checkpoint's process as a checkpoint's."""

import json
from pathlib import Path

from device_bench.gate import gate, save
from device_bench.judge import Allowances
from device_bench.report import build, write
from device_bench.report.build import OLD_GATE
from tests.report_fixture import make_run


def test_a_run_keeps_the_verdict_until_something_is_measured_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path, scenes=4, artifacts=("onnx-fp32",))
    report = write(run, run / "report") / "report.json"
    assert json.loads(report.read_text())["gate"] is None
    judged = report.read_bytes()
    save(gate(report, report, Allowances(must_see=99)), report)  # four images see large drops only
    assert report.read_bytes() == judged
    built = build(run)
    assert built["gate"]["verdict"] == "pass" and "gate" not in built["reasons"]
    assert {"name": "gate", "state": "pass", "text": "gate: pass"} in built["verdicts"]
    result = next(run.glob("results/*/onnx-fp32.json"))
    result.write_text(json.dumps({**json.loads(result.read_text()), "created": "2999-01-01T00:00:00+00:00"}))
    assert build(run)["gate"] is None and build(run)["reasons"]["gate"] == OLD_GATE


def test_a_checkpoint_may_load_torch_and_an_artifact_may_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, scenes=4, artifacts=("onnx-fp32",))
    result = next(run.glob("results/*/onnx-fp32.json"))
    tree = {**json.loads(result.read_text()), "imported": {"torch": True, "transformers": True}}
    for engine, state in (("torch", False), ("onnx", True)):
        result.write_text(json.dumps({**tree, "engine": engine}))
        verdict = next(verdict for verdict in build(run)["verdicts"] if verdict["name"] == "imports")
        assert (verdict["state"] == "fail") is state
