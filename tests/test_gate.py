"""The gate catches what got worse, lets noise pass, and says when it cannot tell."""

import copy
import io
import json
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console

from device_bench.baseline import slim, write_baseline
from device_bench.evaluate import grade, save_answers, score
from device_bench.gate import Verdict, gate, read_report
from device_bench.gate_output import junit, markdown, table
from device_bench.judge import Allowances
from device_bench.tasks.base import BenchQuestion, Sample
from vlm.errors import UserError

N = 3000
DEVICE = {"kind": "host", "name": "box", "soc": "cpu"}


def samples(right: list[bool]) -> list[Sample]:
    asked = [BenchQuestion(str(n), f"image {n}", "gqa", "k", "", str(n), "?", "yes") for n in range(len(right))]
    return [grade(q, "yes" if r else "no") for q, r in zip(asked, right, strict=True)]


def stats(p50: float, mad: float = 0.1) -> Any:
    return {"p50": p50, "mad": mad, "n": 20}


def report(folder: Path, right: list[bool] | None = None, answers: bool = True, **bench: Any) -> Path:
    """A report of one artifact on one device, with its answers beside it."""
    (folder / "report").mkdir(parents=True)
    given = samples(right or [True] * 70 + [False] * 30)
    save_answers(given, folder / "x.answers.jsonl")
    measured = {
        "device": DEVICE,
        "valid": True,
        "invalid_because": None,
        **{key: stats(10.0) for key in ("vision_ms", "ttft_ms", "prefill_tok_s", "decode_tok_s")},
        "peak_rss_mb": 100.0,
        "answers": "x.answers.jsonl" if answers else None,
        "accuracy": score(given),
        "reasons": {},
    }
    artifact = {
        "format": "onnx",
        "precision": "int4",
        "bytes": 1000,
        "parity": {"passed": True, "logits_cos": 0.9999},
        "benches": [{**measured, **bench}],
    }
    tree = {"schema": 1, "models": {}, "artifacts": [artifact], "gate": None}
    (folder / "report" / "report.json").write_text(json.dumps(tree))
    return folder / "report" / "report.json"


def change(path: Path, **artifact: Any) -> Path:
    tree = json.loads(path.read_text())
    tree["artifacts"][0].update(artifact)
    path.write_text(json.dumps(tree))
    return path


def dropped(seed: int, points: float) -> tuple[list[bool], list[bool]]:
    """Right or wrong of two models of which the second is worse by `points`, with some disagreement besides."""
    draw = random.Random(seed)
    before = [draw.random() < 0.7 for _ in range(N)]
    lose = 0.03 + points / 70
    return before, [draw.random() >= lose if right else draw.random() < 0.07 for right in before]


def test_a_report_passes_against_itself(tmp_path: Path) -> None:
    path = report(tmp_path / "a")
    verdict = gate(path, path, Allowances())
    assert (verdict.state, verdict.exit_code, verdict.reasons) == ("pass", 0, [])
    assert {check.group for check in verdict.checks} == {"accuracy", "parity", "latency", "memory", "size"}


@pytest.mark.parametrize("answers", [True, False])
def test_a_large_drop_is_a_regression_paired_and_by_intervals(tmp_path: Path, answers: bool) -> None:
    before, after = dropped(0, 8.0)
    old, new = report(tmp_path / "a", before, answers), report(tmp_path / "b", after, answers)
    verdict = gate(new, old, Allowances())
    assert verdict.exit_code == 1
    how = "paired" if answers else "by intervals"
    assert any("average" in reason and how in reason for reason in verdict.reasons)
    assert gate(new, old, Allowances(max_drop=20, max_task_drop=20)).exit_code == 0


def test_pairing_catches_a_small_drop_that_intervals_cannot_judge(tmp_path: Path) -> None:
    before, after = dropped(1, 2.0)
    old, new = report(tmp_path / "a", before), report(tmp_path / "b", after)
    assert gate(new, old, Allowances(max_task_drop=1.0)).exit_code == 1
    old, new = report(tmp_path / "c", before, answers=False), report(tmp_path / "d", after, answers=False)
    verdict = gate(new, old, Allowances(max_task_drop=1.0))
    assert verdict.exit_code == 2
    assert "too few samples" in verdict.reasons[0]


def test_an_improvement_passes(tmp_path: Path) -> None:
    after, before = dropped(0, 8.0)
    assert gate(report(tmp_path / "a", after), report(tmp_path / "b", before), Allowances()).exit_code == 0


@pytest.mark.parametrize(("metric", "worse"), [("ttft_ms", 12.0), ("decode_tok_s", 8.0)])
def test_a_slowdown_beyond_allowance_and_noise_is_a_regression(tmp_path: Path, metric: str, worse: float) -> None:
    old = report(tmp_path / "a")
    slow: dict[str, Any] = {metric: stats(worse)}
    new = report(tmp_path / "b", None, True, **slow)
    verdict = gate(new, old, Allowances())
    assert verdict.exit_code == 1 and metric in verdict.reasons[0]
    assert gate(new, old, Allowances(max_slowdown=30)).exit_code == 0
    assert gate(new, old, Allowances(ignore=["latency"])).exit_code == 0
    busy = report(tmp_path / "d", None, True, **slow, state={"busy": "the machine was busy"})
    judged = gate(busy, old, Allowances())
    assert judged.exit_code == 2 and "the machine was busy" in judged.reasons[0]
    wobbly: dict[str, Any] = {metric: stats(worse, mad=9.0)}
    noisy = report(tmp_path / "c", None, True, **wobbly)
    assert gate(noisy, old, Allowances()).exit_code == 2


def test_latency_of_another_device_cannot_be_judged_but_ignored(tmp_path: Path) -> None:
    old, new = report(tmp_path / "a"), report(tmp_path / "b", device={**DEVICE, "name": "other"})
    verdict = gate(new, old, Allowances())
    assert verdict.exit_code == 2 and "other device" in verdict.reasons[0]
    ignoring = gate(new, old, Allowances(ignore=["latency"]))
    assert (ignoring.exit_code, ignoring.ignored) == (0, ["latency"])


def test_an_emulated_devices_answers_are_judged_and_its_speed_is_not(tmp_path: Path) -> None:
    emulated = {"device": {**DEVICE, "kind": "emulated"}}
    old = report(tmp_path / "old", **emulated)
    slow = report(tmp_path / "slow", **emulated, decode_tok_s=stats(1.0), peak_rss_mb=900.0)
    verdict = gate(slow, old, Allowances())
    assert verdict.exit_code == 0
    wrong = report(tmp_path / "wrong", right=[True] * 40 + [False] * 60, **emulated)
    assert gate(wrong, old, Allowances()).exit_code == 1


@pytest.mark.parametrize(
    "bench",
    [{"valid": False, "invalid_because": "throttled"}, {"device": {"kind": "phone", "name": "p", "soc": "s"}}],
)
def test_an_invalid_or_missing_bench_cannot_be_judged_nor_ignored(tmp_path: Path, bench: dict[str, Any]) -> None:
    old, new = report(tmp_path / "a"), report(tmp_path / "b", **bench)
    everything = Allowances(ignore=["accuracy", "latency", "memory", "size", "parity"])
    assert gate(new, old, Allowances()).exit_code == 2
    assert gate(new, old, everything).exit_code == 2


def test_a_missing_artifact_cannot_be_judged_and_a_new_one_is_noted(tmp_path: Path) -> None:
    old, new = report(tmp_path / "a"), change(report(tmp_path / "b"), precision="fp32")
    verdict = gate(new, old, Allowances())
    assert verdict.exit_code == 2
    assert verdict.notes == ["onnx-fp32 is new: the baseline has no such artifact"]


def test_failed_parity_growth_of_size_and_of_memory_are_regressions(tmp_path: Path) -> None:
    old = report(tmp_path / "a")
    assert gate(change(report(tmp_path / "b"), parity={"passed": False}), old, Allowances()).exit_code == 1
    assert gate(change(report(tmp_path / "c"), bytes=1100), old, Allowances()).exit_code == 1
    assert gate(report(tmp_path / "d", peak_rss_mb=150.0), old, Allowances()).exit_code == 1
    assert gate(change(report(tmp_path / "e"), parity=None), old, Allowances()).exit_code == 2


def test_what_is_null_now_cannot_be_judged_and_its_reason_is_told(tmp_path: Path) -> None:
    new = report(tmp_path / "b", ttft_ms=None, reasons={"ttft_ms": "the engine crashed"})
    verdict = gate(new, report(tmp_path / "a"), Allowances())
    assert verdict.exit_code == 2 and "the engine crashed" in verdict.reasons[0]


def test_other_questions_or_rules_cannot_be_judged(tmp_path: Path) -> None:
    old = report(tmp_path / "a", [True] * 50)
    fewer = gate(report(tmp_path / "b", [True] * 40), old, Allowances())
    assert fewer.exit_code == 2 and "n was 50, is 40" in fewer.reasons[0]
    new = report(tmp_path / "c", [True] * 50)
    new.write_text(new.read_text().replace("gqa-1", "gqa-2"))
    assert gate(new, old, Allowances()).exit_code == 2


def test_the_student_is_judged_as_well(tmp_path: Path) -> None:
    paths = report(tmp_path / "a", answers=False), report(tmp_path / "b", answers=False)
    for path, right in zip(paths, (90, 40), strict=True):
        tree = json.loads(path.read_text())
        tree["models"] = {"student": {"accuracy": score(samples([n < right for n in range(100)]))}}
        path.write_text(json.dumps(tree))
    assert gate(paths[1], paths[0], Allowances()).reasons[0].startswith("regression: student, average -50 points")


def test_a_slim_baseline_is_judged_like_the_whole_one(tmp_path: Path) -> None:
    old, new = report(tmp_path / "a", answers=False), report(tmp_path / "b", answers=False, ttft_ms=stats(20.0))
    baseline = tmp_path / "tiny.json"
    baseline.write_text(json.dumps(slim(json.loads(old.read_text()))))
    whole, small = gate(new, old, Allowances()), gate(new, baseline, Allowances())
    assert small.record() == whole.record()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2, "artifacts": []}', '{"schema": 1}'])
def test_a_file_that_is_no_report_is_the_users_to_change(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"report\.json"):
        gate(path, path, Allowances())
    with pytest.raises(UserError, match="no such report"):
        gate(tmp_path / "none.json", path, Allowances())


def test_an_empty_baseline_is_no_pass(tmp_path: Path) -> None:
    path = report(tmp_path / "a")
    tree = copy.deepcopy(json.loads(path.read_text()))
    path.write_text(json.dumps({**tree, "artifacts": []}))
    assert gate(path, path, Allowances()).exit_code == 2


def test_table_and_markdown_name_verdict_and_reason(tmp_path: Path) -> None:
    verdict = gate(change(report(tmp_path / "b"), bytes=1100), report(tmp_path / "a"), Allowances())
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(verdict))
    for text in (console.export_text(), markdown(verdict)):
        assert "regression" in text and "bytes" in text and "1,100" in text
    assert json.loads(json.dumps(verdict.record()))["verdict"] == "regression"


def test_the_shipped_allowances_are_valid() -> None:
    assert Allowances.load(Path(__file__).parent.parent / "configs" / "gate.yaml").max_drop > 0


def test_every_option_of_the_shipped_allowances_is_in_the_file() -> None:
    shipped = yaml.safe_load((Path(__file__).parent.parent / "configs" / "gate.yaml").read_text())
    assert shipped.keys() == Allowances.model_fields.keys()


@pytest.mark.parametrize("key", ["threads", "decode_tokens"])
def test_speed_and_memory_under_other_settings_cannot_be_judged(tmp_path: Path, key: str) -> None:
    old = report(tmp_path / "a", settings={"threads": 2, "decode_tokens": 32})
    new = report(tmp_path / "b", settings={"threads": 2, "decode_tokens": 32, key: 1})
    verdict = gate(new, old, Allowances())
    assert verdict.exit_code == 2
    assert {check.group for check in verdict.checks if check.state == "cannot judge"} == {"latency", "memory"}
    assert all(f"other settings: {key}" in reason for reason in verdict.reasons)
    unknown = gate(new, report(tmp_path / "c"), Allowances())
    assert unknown.exit_code == 2 and "None, now" in unknown.reasons[0]


def test_accuracy_of_longer_answers_cannot_be_judged(tmp_path: Path) -> None:
    old = report(tmp_path / "a", settings={"max_new_tokens": 24})
    verdict = gate(report(tmp_path / "b", settings={"max_new_tokens": 8}), old, Allowances())
    assert verdict.exit_code == 2 and "max_new_tokens 24 before, 8 now" in verdict.reasons[0]


def with_student(path: Path, right: list[bool]) -> Path:
    tree, given = json.loads(path.read_text()), samples(right)
    save_answers(given, path.parent / "student.jsonl")
    tree["models"] = {"student": {"accuracy": score(given), "answers": "student.jsonl"}}
    path.write_text(json.dumps(tree))
    return path


def test_the_student_is_judged_paired(tmp_path: Path) -> None:
    before, after = dropped(1, 2.0)
    old, new = with_student(report(tmp_path / "a"), before), with_student(report(tmp_path / "b"), after)
    check = gate(new, old, Allowances()).checks[0]
    assert (check.where, check.state) == ("student", "regression") and check.why.startswith("paired")


def test_a_baseline_in_git_is_compared_question_by_question(tmp_path: Path) -> None:
    before, after = dropped(1, 2.0)
    old, new = (with_student(report(tmp_path / name, right), right) for name, right in (("a", before), ("b", after)))
    baseline = tmp_path / "deep" / "base.json"
    write_baseline(*read_report(old), baseline)
    assert baseline.stat().st_size < 30_000 and "jsonl" not in baseline.read_text()
    whole, kept = gate(new, old, Allowances()), gate(new, baseline, Allowances())
    assert kept.checks == whole.checks
    assert [flip.id for flip in kept.compared[0].flips] == [flip.id for flip in whole.compared[0].flips]


def test_too_few_samples_to_see_a_large_drop_are_no_pass(tmp_path: Path) -> None:
    right = [n % 3 > 0 for n in range(40)]
    wrong = [n % 3 > 0 if n > 4 else n % 2 > 0 for n in range(40)]
    old, new = report(tmp_path / "a", right), report(tmp_path / "b", wrong)
    verdict = gate(new, old, Allowances(max_drop=5, max_task_drop=5))
    assert verdict.exit_code == 2 and "only drops of" in verdict.reasons[0]
    assert gate(new, old, Allowances(max_drop=30, max_task_drop=30, must_see=60)).exit_code == 0


def test_junit_counts_regressions_as_failures_and_unjudged_checks_as_errors(tmp_path: Path) -> None:
    old = report(tmp_path / "a", settings={"threads": 2})
    verdict = gate(change(report(tmp_path / "b", settings={"threads": 1}), bytes=1100), old, Allowances())
    suite = ElementTree.fromstring(junit(verdict))
    assert (suite.get("failures"), suite.get("errors")) == ("1", "5")
    assert len(suite.findall("testcase")) == int(suite.get("tests", "")) == len(verdict.checks)
    assert [case.get("name") for case in suite.findall("testcase") if case.find("failure") is not None] == ["bytes"]
    empty = ElementTree.fromstring(junit(Verdict([], [], [], [])))
    assert empty.find("testcase/error") is not None
