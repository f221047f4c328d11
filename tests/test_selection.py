"""A report speaks only of artifacts of its run's configuration and student, and names what it leaves out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from device_bench.report import build, write
from device_bench.report.selection import NO_TARGET, OTHER_STUDENT, REPLACED, select
from pocketvlm import accuracy
from tests.report_fixture import make_run, write_json
from vlm.folders import tree_sha256
from vlm.models.checkpoint import load_checkpoint

SOME = ("onnx-fp32", "onnx-int4", "coreml-fp16")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A synthetic run of three artifacts."""
    return make_run(tmp_path, scenes=2, artifacts=SOME)


def change(path: Path, **values: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **values})


def shown(run: Path) -> list[str]:
    return [artifact["name"] for artifact in build(run)["artifacts"]]


def judged(run: Path) -> set[str]:
    return set(json.loads(accuracy.write(run, run / "accuracy.json", False).read_text())["artifacts"])


def test_everything_of_the_runs_own_is_shown(run: Path) -> None:
    assert shown(run) == list(SOME)
    assert build(run)["left_out"] == []
    assert judged(run) == {f"local/{name}" for name in SOME}


@pytest.mark.parametrize("folder_is_there", [True, False])
def test_a_target_taken_out_of_the_configuration_is_left_out_and_named(
    run: Path, tmp_path: Path, folder_is_there: bool
) -> None:
    change(run / "config.yaml", export={"targets": ["onnx:fp32", "coreml:fp16"]})
    if not folder_is_there:
        shutil.rmtree(run / "artifacts" / "onnx-int4")
    write_json(run / "stages" / "bench-onnx-int4.json", {"inputs": {}, "seconds": 3.0, "finished": "2001"})
    report = build(run)
    assert [artifact["name"] for artifact in report["artifacts"]] == ["onnx-fp32", "coreml-fp16"]
    assert report["left_out"] == [{"run": "synthetic", "name": "onnx-int4", "why": NO_TARGET}]
    assert not any("onnx-int4" in stage["name"] for stage in report["stages"])
    assert judged(run) == {"local/onnx-fp32", "local/coreml-fp16"}
    out = write(run, tmp_path / "out")
    for name in ("report.md", "index.html"):
        assert f"onnx-int4{':' if name == 'report.md' else ','} {NO_TARGET}" in (out / name).read_text()


def test_an_artifact_of_another_student_is_left_out(run: Path) -> None:
    before = judged(run)
    (run / "student" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert shown(run) == [] and before and judged(run) == set()
    assert {entry["why"] for entry in build(run)["left_out"]} == {OTHER_STUDENT}


def test_a_result_of_an_artifact_that_was_exported_anew_is_left_out(run: Path) -> None:
    change(run / "artifacts" / "onnx-fp32" / "manifest.json", notes=["exported anew"])
    assert shown(run) == list(SOME)
    assert build(run)["artifacts"][0]["benches"] == []
    assert select(run).left_out == {"local/onnx-fp32": REPLACED}
    assert "local/onnx-fp32" not in judged(run)


def test_a_checkpoint_measured_beside_the_artifacts_is_shown(run: Path) -> None:
    change(run / "config.yaml", export={"targets": [name.replace("-", ":") for name in SOME]})
    result = run / "results" / "local" / "onnx-fp32.json"
    about = {"name": "student", "format": "torch", "precision": "fp32", "bytes": 1, "manifest_sha256": None}
    write_json(result.with_name("student.json"), {**json.loads(result.read_text()), "artifact": about})
    assert shown(run) == [*SOME, "student"]


def test_a_students_hash_is_the_one_that_manifests_name(random_checkpoint: Path) -> None:
    assert load_checkpoint(random_checkpoint).sha256 == tree_sha256(random_checkpoint)
