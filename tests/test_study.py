"""Studies: rows share seeds, finished trainings are kept, the test split is read once, differences are paired."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from pocketvlm import steps
from pocketvlm.study import pool
from pocketvlm.study.config import StudyConfig
from pocketvlm.study.run import study
from pocketvlm.study.summary import Study
from tests import fake_study
from vlm.errors import CheckFailed, UserError

ROOT = Path(__file__).parents[1]
STAGE = {
    "name": "s",
    "data": {"kind": "scene_captions", "count": 4},
    "steps": 100,
    "batch_size": 2,
    "learning_rate": 1.0,
}


TWO = "rows=[{name: base}, {name: + better, distill: {stages.0.steps: 130}}]"
REAL_POOL = pool.run


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of three rows and two seeds whose trainings are the fake ones."""
    monkeypatch.setattr(pool, "JOB", "tests.fake_study")
    monkeypatch.setattr(pool, "run", fake_study.run)
    for name in fake_study.MODULES:
        monkeypatch.setitem(sys.modules, name, fake_study.module(name))
    monkeypatch.setattr(steps, "code_version", " ".join)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.chdir(ROOT)
    base = {"name": "base", "distill": {"student": __file__, "stages": [STAGE]}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    tree = {
        "name": "three",
        "base": str(tmp_path / "base.yaml"),
        "rows": [
            {"name": "base"},
            {"name": "+ better", "distill": {"stages.0.steps": 130}},
            {"name": "slow", "distill": {"weight_decay": 0.5}},
        ],
        "seeds": [0, 3],
        "scenes": 9,
    }
    path = tmp_path / "three.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(file: Path, *overrides: str, read_again: bool = False) -> Study:
    return study(StudyConfig.load(file, list(overrides)), file, file.parent / "out", quiet=True, read_again=read_again)


def calls(file: Path) -> list[str]:
    """Tasks done since the last look."""
    path = file.parent / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def row(result: Study, name: str, equal: str = "steps") -> dict:
    return next(entry for entry in result["comparisons"][equal] if entry["row"] == name)


def test_every_row_and_seed_is_trained_once_and_compared_in_pairs(file: Path) -> None:
    result = run(file)
    folders = [f"steps/{name}/seed-{seed}" for name in ("base", "better", "slow") for seed in (0, 3)]
    assert sorted(calls(file)) == sorted(f"{folder} {task}" for folder in folders for task in ("train", "validation"))
    better, slow = row(result, "+ better"), row(result, "slow")
    assert better["difference"]["avg"]["points"] > 0 and len(better["difference"]["avg"]["seeds"]) == 2
    assert slow["difference"]["avg"]["points"] == 0.0 and row(result, "base")["difference"] is None
    assert better["mean"]["avg"] - row(result, "base")["mean"]["avg"] == pytest.approx(
        better["difference"]["avg"]["points"], abs=1e-3
    )
    assert run(file) is not None and calls(file) == []
    assert json.loads((file.parent / "out" / "study.json").read_text())["comparisons"] == result["comparisons"]


def test_the_table_and_the_figure_name_every_row(file: Path) -> None:
    run(file)
    table = (file.parent / "out" / "study.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| + better |"))
    assert "| base | +" in line and line.rstrip(" |").endswith("130 | 0.2 | 130%") and "2 of 2" in line
    drawing = ElementTree.fromstring((file.parent / "out" / "curves-steps.svg").read_text())
    text = "".join(drawing.itertext())
    assert all(name in text for name in ("base", "+ better", "slow", "--accent:"))


@pytest.mark.parametrize("task", ["train", "validation"])
def test_a_killed_cell_is_all_that_is_done_again(file: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """With real processes."""
    monkeypatch.setattr(pool, "run", REAL_POOL)
    killed = f"steps/better/seed-3 {task}"
    monkeypatch.setenv("KILL", killed)
    with pytest.raises(CheckFailed, match=r"\+ better, seed 3: ended with code 9"):
        run(file, TWO, "seeds=[3]")
    assert len(calls(file)) == (3 if task == "train" else 4)
    monkeypatch.delenv("KILL")
    run(file, TWO, "seeds=[3]")
    assert calls(file) == ([killed] if task == "validation" else [killed, "steps/better/seed-3 validation"])
    begun = file.parent / "out" / "steps" / "better" / "seed-3" / "student" / "begun"
    assert begun.read_text() == ("x" if task == "validation" else "xx")  # an interrupted training is taken up


def test_trainings_that_are_killed_with_the_study_stop(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "run", REAL_POOL)
    processes: list[subprocess.Popen] = []
    start = pool.start

    def interrupted(*arguments: Any) -> subprocess.Popen:
        processes.append(start(*arguments))
        if len(processes) == 2:
            raise KeyboardInterrupt
        return processes[-1]

    monkeypatch.setattr(pool, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(file, TWO, "seeds=[3]")
    processes[1].communicate()  # closes its standard input, as this process's end would
    assert all(process.wait(30) != 0 for process in processes)


def test_a_row_that_fails_is_named_and_the_others_are_compared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "better")
    with pytest.raises(CheckFailed, match="2 trainings or evaluations ended badly"):
        run(file)
    table = (file.parent / "out" / "study.md").read_text()
    assert "| + better | failed |" in table and "* + better, seed 0: better collapsed" in table
    result = json.loads((file.parent / "out" / "study.json").read_text())
    assert row(result, "slow")["difference"] is not None


def test_a_changed_row_is_trained_again_and_no_other(file: Path) -> None:
    run(file)
    calls(file)
    run(file, "rows.1.distill={stages.0.steps: 140}")
    assert {line.split()[0] for line in calls(file)} == {"steps/better/seed-0", "steps/better/seed-3"}


def test_a_changed_study_does_not_read_the_test_split_again(file: Path) -> None:
    run(file)
    run(file, "split=test")
    record = file.with_name("three.test-read.json")
    assert len(json.loads(record.read_text())) == 1
    run(file, "split=test", "parallel=1", "name=other")  # not a change of what is compared
    calls(file)
    for change in ("seeds=[0]", "scenes=8", "rows.1.distill={stages.0.steps: 140}", "equal=time"):
        with pytest.raises(UserError, match=r"three\.test-read\.json: the test split was read at .*--read-test-again"):
            run(file, "split=test", change)
    assert calls(file) == []
    run(file, "seeds=[0]")  # validation is for looking
    result = run(file, "split=test", "seeds=[0]", read_again=True)
    assert [entry["forced"] for entry in result["readings"]] == [False, True]
    assert (
        "The test split was read 2 times, 1 of them by a changed study"
        in (file.parent / "out" / "study.md").read_text()
    )


def test_nothing_is_read_before_everything_is_trained(file: Path) -> None:
    run(file, "split=test")
    tasks = [line.split()[1] for line in calls(file)]
    assert tasks == ["train"] * 6 + ["test"] * 6


def test_new_code_reads_the_test_split_on_the_record(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(file, "split=test")
    monkeypatch.setattr(steps, "code_version", lambda entries: "new")
    result = run(file, "split=test")
    assert [entry["forced"] for entry in result["readings"]] == [False, False]


def test_at_equal_time_a_slow_row_gets_fewer_steps(file: Path) -> None:
    result = run(file, "equal=both")
    assert {seed["steps"] for seed in row(result, "slow")["seeds"]} == {100}
    assert {seed["steps"] for seed in row(result, "slow", "time")["seeds"]} == {25}
    assert {seed["seconds"] for entry in result["comparisons"]["time"] for seed in entry["seeds"]} == {10.0}
    assert sum(line.startswith("steps/base") for line in calls(file)) == 4  # the reference row serves both
    assert run(file, "equal=time")["comparisons"].keys() == {"time"} and calls(file) == []


def test_processor_time_does_not_count_what_other_work_took(file: Path) -> None:
    result = run(file, "equal=time", "clock=processor")
    assert {seed["steps"] for seed in row(result, "slow", "time")["seeds"]} == {50}
    assert {seed["seconds"] for seed in row(result, "slow", "time")["seeds"]} == {10.0}


def test_only_what_equal_time_needs_is_trained_at_equal_steps(file: Path) -> None:
    run(file, "equal=time")
    trained = {line.split()[0] for line in calls(file) if line.endswith("train")}
    assert {name for name in trained if name.startswith("steps/")} == {
        "steps/base/seed-0",
        "steps/base/seed-3",
        "steps/better/seed-0",
        "steps/slow/seed-0",
    }


def test_every_row_gets_its_best_learning_rate_by_validation(file: Path) -> None:
    result = run(file, "split=test", "tuning={factors: [0.5, 1, 2], seeds: [7]}")
    assert set(result["tuning"]) == {"base", "+ better", "slow"}
    assert row(result, "slow")["seeds"][0]["learning_rates"] == [2.0]
    done = calls(file)
    assert sum(line.endswith(" validation") for line in done) == 9
    assert {line.split("-x")[1].split("/")[0] for line in done if line.endswith(" test")} == {"2.0"}


def test_what_tuning_trained_is_not_trained_again(file: Path) -> None:
    run(file, "tuning={factors: [0.5, 1, 2], seeds: [0]}")
    assert sum(line.endswith(" train") for line in calls(file)) == 3 * 3 + 3


def test_a_row_may_be_compared_with_another_than_the_first(file: Path) -> None:
    result = run(file, "rows.2.against=+ better")
    assert row(result, "slow")["against"] == "+ better" and row(result, "slow")["difference"]["avg"]["points"] < 0


def test_a_row_may_change_another_run(file: Path) -> None:
    tree = yaml.safe_load((file.parent / "base.yaml").read_text())
    tree["distill"]["stages"][0]["steps"] = 60
    (file.parent / "other.yaml").write_text(yaml.safe_dump({**tree, "bench": {"scenes": 7}}))
    rows = [{"name": "base"}, {"name": "slow", "base": str(file.parent / "other.yaml")}]
    result = run(file, f"rows={json.dumps(rows)}")
    assert row(result, "slow")["seeds"][0]["steps"] == 60
    assert row(result, "slow")["difference"]["avg"]["points"] < 0  # on the study's questions, not on the other run's


def test_equal_time_follows_the_chain_of_rows_to_its_end(file: Path) -> None:
    rows = yaml.safe_load(file.read_text())["rows"]
    rows[1]["against"] = "+ better"
    rows[2]["against"] = "+ better"
    result = run(file, f"rows={json.dumps(rows)}", "equal=time")
    assert row(result, "+ better", "time")["difference"] is None
    assert {seed["steps"] for seed in row(result, "slow", "time")["seeds"]} == {32}  # 13 s of 40 s, of 100 steps
    rows[1]["against"] = "base"
    result = run(file, f"rows={json.dumps(rows)}", "equal=time")
    assert {seed["steps"] for seed in row(result, "slow", "time")["seeds"]} == {25}


def test_rows_that_did_not_start_alike_are_refused(file: Path) -> None:
    result = run(file)
    folder = Path(row(result, "slow")["seeds"][1]["folder"]) / "student" / "history.json"
    tree = json.loads(folder.read_text())
    tree["rows"][0]["terms"]["sup"]["value"] += 0.1
    folder.write_text(json.dumps(tree))
    with pytest.raises(CheckFailed, match=r"seed 3: .* of row 'slow' is 7\.1, that of 'base' 7\.0"):
        run(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds=[1, 1]", "the same one twice"),
        ("rows.1.name=Base", "differs from the others"),
        ("rows.1.against=nobody", "is against 'nobody', which is no row before it"),
        ("rows.0.against=slow", "is against 'slow', which is no row before it"),
        ("rows.1.distill={stagse: 1}", r"row '\+ better' of study 'three': .*unknown key 'distill.stagse'"),
        ("split=train", "Input should be 'validation' or 'test'"),
    ],
)
def test_a_study_that_cannot_be_done_is_refused(file: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(file, change)
    assert calls(file) == []
