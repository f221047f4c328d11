"""The pipeline builds what is not there, skips what holds, and goes on after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pocketvlm import sources, steps
from pocketvlm.pipeline import RunConfig
from tests import road
from vlm.errors import UserError
from vlm.folders import locked

ROOT = Path(__file__).parents[1]
STUDENTS = ["student", "undistilled"]
EXPORTS = ["export-onnx-fp32", "export-gguf-q4_0"]
BENCHES = ["bench-onnx-fp32", "bench-gguf-q4_0"]
EVALUATIONS = ["evaluate-student", "evaluate-undistilled"]
ALL = [*STUDENTS, *EVALUATIONS, *EXPORTS, *BENCHES, "report"]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty run folder; the fake stages are taken out again afterwards."""
    for name in road.STAGES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(steps, "code_version", road.version)
    return tmp_path / "run"


def stamp(run_dir: Path, name: str) -> dict[str, object]:
    content = json.loads((run_dir / "stages" / f"{name}.json").read_text())
    assert isinstance(content, dict)
    return content


def test_builds_everything_once_and_then_nothing(run_dir: Path) -> None:
    built, outcomes, problems = road.walk(run_dir)
    assert built == ALL and problems == []
    assert {outcome.state for outcome in outcomes} == {"built"}
    built, outcomes, _ = road.walk(run_dir)
    assert built == []
    assert {outcome.state for outcome in outcomes} == {"up to date"}


def test_config_yaml_is_the_run_and_builds_an_equal_one(run_dir: Path) -> None:
    road.walk(run_dir)
    assert RunConfig.parse(yaml.safe_load((run_dir / "config.yaml").read_text()), "test") == road.config()


@pytest.mark.parametrize(
    ("deleted", "rebuilt"),
    [
        ("student", ["student", "evaluate-student", *EXPORTS, *BENCHES, "report"]),
        ("undistilled", ["undistilled", "evaluate-undistilled", "report"]),
        ("evaluations/student", ["evaluate-student", "report"]),
        ("artifacts/onnx-fp32", ["export-onnx-fp32", "bench-onnx-fp32", "report"]),
        ("results/local/gguf-q4_0.json", ["bench-gguf-q4_0", "report"]),
        ("report", ["report"]),
        ("stages/bench-onnx-fp32.json", ["bench-onnx-fp32", "report"]),
    ],
)
def test_deleting_one_thing_rebuilds_it_and_what_depends_on_it(run_dir: Path, deleted: str, rebuilt: list[str]) -> None:
    road.walk(run_dir)
    path = run_dir / deleted
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert road.walk(run_dir)[0] == rebuilt
    assert road.walk(run_dir)[0] == []


@pytest.mark.parametrize(
    ("changes", "rebuilt"),
    [
        ({"bench": {"iterations": 7}}, [*BENCHES, "report"]),
        ({"export": {"targets": road.TARGETS, "probes": 3}}, [*EXPORTS, *BENCHES, "report"]),
        ({"export": {"targets": [*road.TARGETS, "onnx:int4"]}}, ["export-onnx-int4", "bench-onnx-int4", "report"]),
        (
            {"export": {"targets": [*road.TARGETS, "onnx:int4,vision=fp16"]}},
            ["export-onnx-int4-vision-fp16", "bench-onnx-int4-vision-fp16", "report"],
        ),
    ],
)
def test_a_changed_section_rebuilds_its_stage_and_what_follows(
    run_dir: Path, changes: dict[str, object], rebuilt: list[str]
) -> None:
    road.walk(run_dir)
    assert road.walk(run_dir, road.config(**changes))[0] == rebuilt


def test_changed_code_rebuilds_only_what_runs_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "code_version", sources.code_version)
    road.walk(run_dir)
    changed = sources.source("vlm.runtimes.onnx")
    real = sources.file_hash
    monkeypatch.setattr(sources, "file_hash", lambda path: "other" if path == changed else real(path))
    built = road.walk(run_dir)[0]
    assert "bench-onnx-fp32" in built and "student" not in built


def test_changed_input_file_rebuilds_everything(run_dir: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "weights").write_text("1")
    settings = road.config()
    settings = settings.model_copy(update={"distill": settings.distill.model_copy(update={"teacher": str(teacher)})})
    road.walk(run_dir, settings)
    assert road.walk(run_dir, settings)[0] == []
    (teacher / "weights").write_text("2")
    assert road.walk(run_dir, settings)[0] == ALL


def test_changed_records_of_a_recipe_rebuild_everything(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text("[1]")
    part = {"name": "some", "records": "records.json", "images": "images", "folders": ["coco"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"parts": [part]}))
    data = {"kind": "llava", "recipe": str(tmp_path / "recipe.yaml"), "root": str(tmp_path)}
    distill = road.config().distill.model_dump(mode="json")
    distill["stages"][0]["data"] = data
    settings = road.config(distill=distill)
    with pytest.raises(UserError, match=r"stage s: the data is not complete:(.|\n)*images/coco: no such image folder"):
        road.walk(run_dir, settings)
    (tmp_path / "images" / "coco").mkdir(parents=True)
    road.walk(run_dir, settings)
    assert road.walk(run_dir, settings)[0] == []
    for changed in (tmp_path / "records.json", tmp_path / "images" / "coco" / "new.jpg"):
        changed.write_text("[2]")
        assert road.walk(run_dir, settings)[0] == ALL


def test_a_wrong_target_task_or_device_is_said_before_anything_is_built(run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"unknown format 'onx'\. Did you mean 'onnx'"):
        road.config(export={"targets": ["onx:int4"]})
    with pytest.raises(UserError, match=r"unknown device 'locl'\. Did you mean 'local'"):
        road.config(bench={"device": "locl"})
    with pytest.raises(UserError, match="task 'pope' grades answers but brings no questions"):
        road.config(bench={"tasks": ["pope"]})
    with pytest.raises(UserError, match="target 'onnx:int5'"):
        road.walk(run_dir, road.config(export={"targets": ["onnx:int5"]}))
    assert not (run_dir.parent / "calls").exists()


def test_missing_input_file_names_the_key(run_dir: Path) -> None:
    settings = road.config()
    settings = settings.model_copy(update={"distill": settings.distill.model_copy(update={"teacher": "/no/such"})})
    with pytest.raises(UserError, match=r"distill\.teacher: /no/such does not exist"):
        road.walk(run_dir, settings)


def test_a_leftover_of_other_inputs_is_not_resumed(run_dir: Path) -> None:
    road.walk(run_dir, fail="export-onnx-fp32")
    assert (run_dir / "artifacts" / "onnx-fp32.partial" / "begun").is_file()
    (run_dir / "artifacts" / "onnx-fp32.partial" / "old").touch()
    road.walk(run_dir, road.config(export={"targets": road.TARGETS, "probes": 3}))
    assert not (run_dir / "artifacts" / "onnx-fp32" / "old").exists()


def test_a_failed_check_keeps_the_rest_going_and_is_tried_again(run_dir: Path) -> None:
    built, outcomes, problems = road.walk(run_dir, fail="export-onnx-fp32")
    assert problems == ["export-onnx-fp32 is wrong"]
    assert built == [*STUDENTS, *EVALUATIONS, *EXPORTS, "bench-gguf-q4_0", "report"]
    assert [o.state for o in outcomes if o.step == "measure onnx:fp32"] == ["left out"]
    built, _, problems = road.walk(run_dir)
    assert built == ["export-onnx-fp32", "bench-onnx-fp32", "report"] and problems == []


@pytest.mark.parametrize("product", ["student", "export-gguf-q4_0", "bench-onnx-fp32", "report", "export-onnx-fp32!"])
def test_a_killed_run_goes_on_from_the_last_finished_step(run_dir: Path, product: str) -> None:
    command = [sys.executable, "-m", "tests.road", str(run_dir)]
    environment = {**os.environ, "BLOCK": product}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "blocked\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = (run_dir.parent / "calls").read_text().splitlines()
    expected = ALL[len(done) - (0 if product.endswith("!") else 1) :]
    assert road.walk(run_dir)[0] == expected
    assert road.walk(run_dir)[0] == []


def test_a_second_run_in_the_same_folder_is_refused(run_dir: Path) -> None:
    with (
        locked(run_dir / ".lock", wait=False),
        pytest.raises(UserError, match=rf"process {os.getpid()}\) works in this folder"),
    ):
        road.walk(run_dir)
    road.walk(run_dir)


def test_what_stages_print_goes_to_a_file(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "tests.road", str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "talks" not in done.stdout + done.stderr
    assert (run_dir / "stages" / "report.log").read_text() == "report talks\n"


def test_stamps_record_inputs_build_and_time(run_dir: Path) -> None:
    road.walk(run_dir)
    export = stamp(run_dir, "export-onnx-fp32")
    assert export["finished"] and export["seconds"] is not None
    assert isinstance(export["inputs"], dict) and export["inputs"]["student"] == stamp(run_dir, "student")["build"]
