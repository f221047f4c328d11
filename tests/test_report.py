"""The report: what it says of a run, what it says of what is missing, and that its page is one safe file."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_bench.evaluate import load_answers, save_answers
from device_bench.report import build, write
from device_bench.report.charts import accuracy_points
from device_bench.report.compare import changed_answers, difference
from device_bench.report.markdown import markdown
from device_bench.report.svg import COLOURS
from device_bench.report.table import table
from device_bench.report.training import thin
from device_bench.report.wording import badges
from device_bench.report.write import raw_samples
from device_bench.stats import paired_difference
from tests.report_fixture import NEEDS_MACOS, make_run, write_json
from vlm.bars import accuracy_verdict
from vlm.errors import UserError

SOME = ("onnx-fp32", "onnx-int4", "coreml-fp16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic run; tests only read it."""
    return make_run(tmp_path_factory.mktemp("report"), scenes=8, artifacts=SOME)


@pytest.fixture(scope="module")
def drawn(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the synthetic run, written."""
    return write(run, tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def page(drawn: Path) -> str:
    """The page of the synthetic run."""
    return (drawn / "index.html").read_text()


@pytest.fixture
def own_run(tmp_path: Path) -> Path:
    """A synthetic run that a test may change."""
    return make_run(tmp_path, scenes=3, artifacts=SOME)


def test_report_json_has_the_schema(run: Path) -> None:
    report = build(run)
    assert report["schema"] == 1
    assert set(report["run"]) >= {"name", "created", "git", "host", "versions", "seeds"}
    assert report["models"]["student"]["params"] == 1_210_000
    assert set(report["models"]["teacher"]["accuracy"]["tasks"]) == {
        "gqa",
        "scienceqa",
        "textvqa",
        "mme",
        "mmbench",
        "pope",
    }
    assert [artifact["name"] for artifact in report["artifacts"]] == ["onnx-fp32", "onnx-int4", "coreml-fp16"]
    artifact = report["artifacts"][0]
    assert set(artifact) >= {"format", "precision", "bytes", "parity", "benches"}
    assert set(artifact["parity"]) >= {"vision_cos", "logits_cos", "kl", "token_agreement", "passed"}
    measured = {
        "load_ms",
        "vision_ms",
        "ttft_ms",
        "prefill_tok_s",
        "decode_tok_s",
        "peak_rss_mb",
        "energy_j",
        "accuracy",
    }
    assert set(artifact["benches"][0]) >= {"device", "valid", "invalid_because", "thermal", "samples"} | measured
    assert (run / artifact["benches"][0]["samples"]).is_file()


def test_every_missing_number_has_a_reason(run: Path) -> None:
    def missing(node: Any, path: str) -> list[str]:
        if isinstance(node, list):
            return [found for index, item in enumerate(node) for found in missing(item, f"{path}[{index}]")]
        if not isinstance(node, dict):
            return []
        alone = [f"{path}.{key}" for key, value in node.items() if value is None and key not in node.get("reasons", {})]
        here = (
            [name for name in alone if not name.endswith(("invalid_because", "first_divergence"))]
            if "reasons" in node
            else []
        )
        return here + [found for key, value in node.items() for found in missing(value, f"{path}.{key}")]

    report = build(run)
    assert missing(report, "report") == []
    (core_ml,) = (artifact for artifact in report["artifacts"] if artifact["format"] == "coreml")
    assert core_ml["benches"][0]["ttft_ms"] is None
    assert core_ml["benches"][0]["reasons"]["ttft_ms"] == NEEDS_MACOS


def test_distillation_is_the_paired_difference_to_the_undistilled_student(run: Path) -> None:
    before, after = (load_answers(run / name / "answers.jsonl") for name in ("undistilled", "student"))
    expected = paired_difference(before, after)
    found = build(run)["distillation"]["difference"]
    assert found["points"] == expected["avg"]["points"] != 0
    assert found["ci95"] == expected["avg"]["ci95"]
    assert found["tasks"]["pope"] == expected["pope"]


def test_only_common_questions_are_compared(run: Path) -> None:
    before, after = (load_answers(run / name / "answers.jsonl") for name in ("undistilled", "student"))
    found, _ = difference(before[:50], after[20:])
    assert found is not None and found["n"] == 30
    assert difference(before[:50], after[50:])[0] is None


def test_the_ladder_ends_with_task_accuracy(own_run: Path) -> None:
    lost = own_run / "results" / "local" / "onnx-fp32.answers.jsonl"
    save_answers([replace(sample, answer="?", correct=0.0) for sample in load_answers(lost)], lost)
    intact, broken = (
        next(a for a in build(own_run)["artifacts"] if a["name"] == n)["parity"] for n in ("coreml-fp16", "onnx-fp32")
    )
    assert intact["rungs"][-1]["name"] == broken["rungs"][-1]["name"] == "accuracy"
    assert broken["rungs"][-1]["bar"] == -0.5
    assert not broken["rungs"][-1]["passed"] and not broken["passed"]


def test_a_loss_within_the_noise_is_no_failure_and_no_pass() -> None:
    found = -0.9, [-2.0, -0.3]
    assert accuracy_verdict(*found, "fp16") == "unknown"
    assert accuracy_verdict(*found, "int4") == "pass"
    assert accuracy_verdict(found[0], [-2.5, -1.1], "fp16") == "fail"


def test_failures_come_first_in_markdown_and_headline(own_run: Path) -> None:
    path = own_run / "artifacts" / "onnx-int4" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parity"] |= {"passed": False}
    manifest["parity"]["rungs"][1] |= {"value": 0.5, "passed": False}
    write_json(path, manifest)
    text = markdown(build(own_run))
    assert text.splitlines()[2].startswith("One of three artifacts is not proven equal to the trained model.")
    first = next(line for line in text.splitlines() if line.startswith("- "))
    assert first.startswith("- ❌ parity") and "ONNX int4" in first
    assert text.index("### Under the bar") < text.index("| artifact |")


def test_a_lost_accuracy_is_judged_once_and_allowed_where_the_run_says_so(own_run: Path) -> None:
    path = own_run / "results" / "local" / "onnx-int4.answers.jsonl"
    save_answers([replace(sample, correct=0.0) for sample in load_answers(path)], path)
    for allowed in (False, True):
        write_json(own_run / "config.yaml", {"export": {"allow_drift": allowed}})
        report = build(own_run)
        artifact = next(artifact for artifact in report["artifacts"] if artifact["name"] == "onnx-int4")
        assert artifact["benches"][0]["difference"]["state"] == "fail"
        assert (artifact["parity"]["passed"], artifact["parity"]["allowed_drift"]) == (False, allowed)
        assert ("drift allowed" in badges(artifact, None)) is allowed
        assert any(found["name"] == "accuracy" and found["state"] == "fail" for found in report["verdicts"])


def test_an_invalid_result_shows_its_reason_and_no_number(own_run: Path) -> None:
    path = own_run / "results" / "local" / "onnx-fp32.json"
    write_json(path, {**json.loads(path.read_text()), "valid": False, "invalid_because": "killed by signal 9"})
    report = build(own_run)
    _, rows, notes = table(report)
    assert [cell.main for cell in rows[0].cells[2:]] == [""] * 8
    assert notes[rows[0].cells[3].note - 1] == "invalid: killed by signal 9"
    points = accuracy_points(report["artifacts"], "decode_tok_s", None)
    assert [point.name for point in points] == ["ONNX int4"]


def test_random_weights_are_said_in_charts(own_run: Path) -> None:
    path = own_run / "results" / "local" / "onnx-fp32.json"
    write_json(path, {**json.loads(path.read_text()), "notes": ["random weights of the real size"]})
    points = accuracy_points(build(own_run)["artifacts"], "ttft_ms", None)
    assert points[0].name == "ONNX fp32 (random weights)"


def test_model_text_stays_text(own_run: Path, tmp_path: Path) -> None:
    path = own_run / "results" / "local" / "onnx-int4.answers.jsonl"
    evil = "<script>alert(1)</script>\"'|`"
    save_answers([replace(sample, answer=evil) for sample in load_answers(path)], path)
    out = write(own_run, tmp_path / "out")
    page = (out / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in (out / "report.md").read_text()


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert len(links) > 20
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert "<script" not in page and "@import" not in page
    assert len(page.encode()) < 3_000_000


def test_ids_are_unique_and_every_reference_has_its_target(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert targets and targets <= set(ids)


def test_charts_use_the_colours_of_the_page(page: str) -> None:
    assert page.count('<svg class="chart"') >= 12
    assert [name for name, stand_in in COLOURS.items() if stand_in in page] == []
    used = set(re.findall(r"var\(--([a-z]+)\)", page))
    defined = set(re.findall(r"--([a-z]+):", page))
    assert used <= defined


def test_the_same_run_gives_the_same_bytes_and_nothing_else_is_touched(run: Path, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert write(run, tmp_path) == tmp_path
    assert (tmp_path / "mine.txt").read_text() == "mine"
    for name in ("report.json", "report.md", "index.html"):
        assert (tmp_path / name).read_bytes() == (drawn / name).read_bytes()


def test_changed_answers_show_their_pictures(page: str, run: Path) -> None:
    int4 = build(run)["artifacts"][1]["benches"][0]["changed"]
    assert int4["changed"] == int4["lost"] + int4["gained"] + int4["other"] > 0
    assert page.count("data:image/jpeg;base64,") == sum(
        len(artifact["benches"][0]["changed"]["shown"]) for artifact in build(run)["artifacts"]
    )


def test_at_most_twelve_changes_are_shown_and_the_worst_first(run: Path) -> None:
    before = load_answers(run / "student" / "answers.jsonl")
    after = [replace(sample, answer="other", correct=0.0) for sample in before]
    change = changed_answers(before, after)
    assert change is not None
    assert change["changed"] == change["compared"] == len(before)
    assert change["lost"] == sum(sample.correct > 0 for sample in before)
    assert [item["verdict"] for item in change["shown"]] == ["lost"] * 12
    assert len({item["family"] for item in change["shown"]}) == 6


def test_a_run_with_artifacts_only_says_what_is_missing(own_run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (own_run / "artifacts").rename(bare / "artifacts")
    report = build(bare)
    assert report["distillation"]["difference"] is None and report["distillation"]["reasons"]["difference"]
    assert report["models"]["student"] == {
        "params": None, "params_by_part": None, "accuracy": None,
        "reasons": dict.fromkeys(("params", "params_by_part", "accuracy"), "the run has no student checkpoint"),
    }  # fmt: skip
    page = (write(bare, tmp_path / "out") / "index.html").read_text()
    assert "not measured on any device" in page
    assert "no student checkpoint" in page


def test_bench_folders_are_merged(own_run: Path, tmp_path: Path) -> None:
    phone = tmp_path / "phone"
    phone.mkdir()
    (own_run / "results" / "local").rename(phone / "adb")
    report = build([own_run, phone])
    assert [artifact["run"] for artifact in report["artifacts"]] == ["synthetic"] * 3 + ["phone"] * 3
    measured = report["artifacts"][3]
    assert measured["bytes"] == 7_900_000 and measured["parity"] is None and measured["reasons"]["parity"]
    assert measured["benches"][0]["samples"] == "adb/onnx-fp32.samples.json"
    assert raw_samples(report, [own_run, phone])["phone", "adb/onnx-fp32.samples.json"]["ttft_ms"]


def test_what_cannot_be_read_is_named(own_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither artifacts nor results"):
        build(tmp_path / "runs")
    with pytest.raises(UserError, match="two folders are named 'runs/synthetic'"):
        build([own_run, own_run])
    (own_run / "student" / "history.json").write_text("{")
    with pytest.raises(UserError, match=r"history\.json: not JSON"):
        build(own_run)


def test_thinning_keeps_gradient_norms_and_the_edges_of_stages() -> None:
    rows = [
        {"step": i, "stage": "a" if i < 501 else "b", "terms": {"sup": {"grad_norm": 1.0 if i % 37 == 0 else None}}}
        for i in range(1000)
    ]
    kept = [row["step"] for row in thin(rows, most=100)]
    assert len(kept) < 140
    assert {0, 500, 501, 999} <= set(kept)
    assert set(range(0, 1000, 37)) <= set(kept)


def test_the_report_needs_no_torch() -> None:
    code = "import sys, device_bench.report; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
