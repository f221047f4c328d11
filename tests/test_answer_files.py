"""Answer files as other people's scripts leave them: byte order marks, null answers, ids as floats, other layouts."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from device_bench.evaluate import UNKNOWN_LINE, questions, regrade, versions
from device_bench.predictions import score_predictions
from device_bench.records import read_records, write_records
from device_bench.rows import read_rows
from device_bench.tasks import mmbench, mme
from device_bench.tasks.base import TaskScore
from pocketvlm.cli import app
from tests.layouts import FILES, LLAVA, TABLES, predicted, write_json, write_tsv
from vlm.data.scenes.question import FAMILIES
from vlm.errors import UserError

BOM = "\ufeff"


def scored(path: Path, family: str, data: Path | None) -> TaskScore:
    return score_predictions(path, family, data)[0]["tasks"][family]


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_files_are_read_like_others(family: str, tmp_path: Path) -> None:
    rows = LLAVA[family](tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".txt", ".tsv"):
            path.write_text(BOM + path.read_text(), newline="\r\n")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(BOM + "\n".join(map(json.dumps, rows)), newline="\r\n")
    assert scored(answers, family, tmp_path)["score"] == 100
    kit = tmp_path / f"model_{family}.tsv"
    write_tsv(kit, predicted(family))
    kit.write_text(BOM + kit.read_text(), newline="\r\n")
    assert scored(kit, family, None)["score"] == 100


def test_the_mme_tools_folder_may_be_of_windows(tmp_path: Path) -> None:
    lines = "a.jpg\tIs it?\tYes\tYes\na.jpg\tIs it b?\tNo\tno\n"
    for category in mme.CATEGORIES:
        (tmp_path / f"{category}.txt").write_text(BOM + lines, newline="\r\n")
    assert scored(tmp_path, "mme", None)["details"]["perception"] == 2000


def test_a_cut_result_of_the_mme_tool_is_refused_as_the_tool_does(tmp_path: Path) -> None:
    for category in mme.CATEGORIES:
        (tmp_path / f"{category}.txt").write_text("a.jpg\tIs it?\tYes\tYes\na.jpg\tIs it b?\tNo\tno\n")
    assert "not all of a known edition" in scored(tmp_path, "mme", None)["details"]["line"]
    (tmp_path / "scene.txt").write_text("a.jpg\tIs it?\tYes\tYes\n")
    with pytest.raises(UserError, match=r"MME scene: a\.jpg has 1 questions"):
        scored(tmp_path, "mme", None)
    (tmp_path / "scene.txt").unlink()
    with pytest.raises(UserError, match=r"scene\.txt missing"):
        scored(tmp_path, "mme", None)


def test_mme_is_found_four_folders_down(tmp_path: Path) -> None:
    LLAVA["mme"](tmp_path)
    release = tmp_path / "MME" / "MME_Benchmark_release_version"
    (tmp_path / "count").mkdir()  # of something else
    below = tmp_path / "data" / "MME" / release.name / "MME_Benchmark"
    below.parent.mkdir(parents=True)
    release.rename(below)
    assert len(questions(["mme"], 1, tmp_path)) == len(questions(["mme"], 1, below)) == 4


def test_vlmevalkits_repeated_rows_count_once_and_a_part_of_a_benchmark_says_so(tmp_path: Path) -> None:
    rows = predicted("mmbench")
    write_json(tmp_path / "kit.jsonl", [{**rows[0], "prediction": "?"}, *rows], lines=True)
    found = scored(tmp_path / "kit.jsonl", "mmbench", None)
    assert (found["score"], found["n"], found["details"]["data"]["repeated"]) == (100, 4, 1)
    assert found["details"]["line"] == f"MMBench circular accuracy 100.00{UNKNOWN_LINE}"


def test_answers_in_gqas_own_form_are_compared_as_they_are(tmp_path: Path) -> None:
    LLAVA["gqa"](tmp_path)
    answers = tmp_path / "answers.json"
    write_json(answers, [{"questionId": "7", "prediction": "Red bus."}, {"questionId": "8", "prediction": "yes"}])
    accuracy, samples = score_predictions(answers, "gqa", tmp_path)
    assert accuracy["tasks"]["gqa"]["score"] == 50 and [regrade(sample) for sample in samples] == samples


@pytest.mark.parametrize("said", [["No"], False, {"text": "No"}])
def test_an_answer_that_is_no_text_is_named(said: Any, tmp_path: Path) -> None:
    rows = LLAVA["pope"](tmp_path)
    write_json(tmp_path / "answers.jsonl", [rows[0], {**rows[1], "text": said}, *rows[2:]], lines=True)
    with pytest.raises(UserError, match=r"answer 2: the answer is .*, a text was expected"):
        scored(tmp_path / "answers.jsonl", "pope", tmp_path)


@given(text=st.text(st.characters(min_codepoint=0xD700), max_size=6))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_any_answer_in_json_can_be_written_again(name: str, tmp_path_factory: Any, text: str) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    folder = tmp_path_factory.mktemp("surrogates")
    rows = LLAVA["gqa"](folder)
    write_json(folder / "answers.jsonl", [{**row, "text": f"No {text}\ud83d"} for row in rows], lines=True)
    _, samples = score_predictions(folder / "answers.jsonl", "gqa", folder)
    write_records(samples, folder / name, {})
    assert read_records(folder / name) == samples


def test_what_an_answer_file_lacks_or_repeats_is_said(tmp_path: Path) -> None:
    rows = LLAVA["scienceqa"](tmp_path)
    write_json(tmp_path / "a.jsonl", [rows[1], rows[1], {"question_id": "99", "text": "B"}], lines=True)
    with pytest.raises(UserError, match="no question is '99'"):
        scored(tmp_path / "a.jsonl", "scienceqa", tmp_path)
    write_json(tmp_path / "a.jsonl", [rows[1], rows[1]], lines=True)
    asked = ["eval", "--predictions", tmp_path / "a.jsonl", "--tasks", "scienceqa", "--data", tmp_path]
    shown = CliRunner().invoke(app, [*map(str, asked)]).stdout
    assert "ScienceQA Accuracy 50.00" in shown and "IMG-Accuracy" not in shown
    assert "unanswered: 1 questions" in shown and "repeated: 1 answers" in shown


def test_options_of_several_lines_and_two_spaces_are_llavas(tmp_path: Path) -> None:
    value = "Context: A. no\nWhich closing?\nA. Love,\nZoe\nB. love,\nzoe\n<image>"
    row = {"id": "1", "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}]}
    write_json(tmp_path / "a" / "llava_test_CQM-A.json", [row])
    assert questions(["scienceqa"], 1, tmp_path / "a")[0].options == ("Love,\nZoe", "love,\nzoe")
    problem = {"question": "Which  one? ", "choices": ["x  y", "z "], "answer": 1, "hint": "", "image": None}
    write_json(tmp_path / "b" / "problems.json", {"1": problem})
    write_json(tmp_path / "b" / "pid_splits.json", {"test": ["1"]})
    assert questions(["scienceqa"], 1, tmp_path / "b")[0].prompt.startswith("Which one? \nA. x y\nB. z\nAnswer")


def test_popes_ids_of_llava_need_llavas_questions(tmp_path: Path) -> None:
    rows = LLAVA["pope"](tmp_path)
    (tmp_path / "pope" / "llava_pope_test.jsonl").unlink()
    write_json(tmp_path / "answers.jsonl", rows, lines=True)
    with pytest.raises(UserError, match=r"llava_pope_test\.jsonl.* is not beside the labels"):
        scored(tmp_path / "answers.jsonl", "pope", tmp_path)


def test_a_table_is_known_by_its_published_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "MMBench_DEV_EN_V11.tsv"
    write_tsv(table, TABLES["mmbench"])
    monkeypatch.setitem(mmbench.BY_MD5, hashlib.md5(table.read_bytes()).hexdigest(), "V1.1")
    assert versions(questions(["mmbench"], 1, tmp_path))["mmbench"]["edition"] == "V1.1"


def test_ids_as_floats_and_numbers_as_answers_are_read(tmp_path: Path) -> None:
    write_tsv(tmp_path / FILES["gqa"], [{**TABLES["gqa"][0], "answer": "2"}])
    for row in ({"question_id": 7.0, "text": 2}, {"index": "7.0", "prediction": "2"}):
        write_json(tmp_path / "answers.jsonl", [row], lines=True)
        assert scored(tmp_path / "answers.jsonl", "gqa", tmp_path)["score"] == 100


@pytest.mark.parametrize("text", ["null", "NaN"])
def test_a_null_answer_is_an_empty_one(text: str, tmp_path: Path) -> None:
    rows = LLAVA["gqa"](tmp_path)
    lines = [f'{{"question_id": "{rows[0]["question_id"]}", "text": {text}}}', json.dumps(rows[1])]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    accuracy, samples = score_predictions(tmp_path / "answers.jsonl", "gqa", tmp_path)
    assert accuracy["tasks"]["gqa"]["score"] == 50 and samples[0].answer == ""


def test_of_repeated_answers_the_last_counts_and_they_are_counted(tmp_path: Path) -> None:
    rows = LLAVA["gqa"](tmp_path)
    write_json(tmp_path / "answers.jsonl", [{**rows[0], "text": "wrong"}, *rows], lines=True)
    found = scored(tmp_path / "answers.jsonl", "gqa", tmp_path)
    assert found["score"] == 100 and found["details"]["data"]["repeated"] == 1


def test_an_unanswered_scienceqa_question_is_wrong_but_not_in_the_image_subset(tmp_path: Path) -> None:
    """eval_science_qa.py looks for <image> in the answer's prompt."""
    rows = LLAVA["scienceqa"](tmp_path)
    plain = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]
    path = tmp_path / "scienceqa" / "llava_test_CQM-A.json"
    write_json(path, [*json.loads(path.read_text()), {"id": "3", "image": "1/image.png", "conversations": plain}])
    write_json(tmp_path / "answers.jsonl", rows, lines=True)
    found = scored(tmp_path / "answers.jsonl", "scienceqa", tmp_path)
    assert (found["score"], found["n"]) == (100, 1)
    assert (found["details"]["all"], found["details"]["data"]["unanswered"]) == (pytest.approx(200 / 3, abs=1e-3), 1)


def test_results_of_scienceqas_own_script_are_places_of_options(tmp_path: Path) -> None:
    LLAVA["scienceqa"](tmp_path)
    write_json(tmp_path / "result.json", {"acc": 50.0, "results": {"1": 1, "2": -1}})
    found = scored(tmp_path / "result.json", "scienceqa", tmp_path)
    assert (found["score"], found["details"]["all"], found["details"]["failed"]) == (100, 50, 1)


def test_popes_own_answers_stand_in_the_order_of_one_settings_labels(tmp_path: Path) -> None:
    LLAVA["pope"](tmp_path)
    (tmp_path / "pope" / "llava_pope_test.jsonl").unlink()
    rows: list[dict[str, Any]] = [
        {"question": "is there a dog?", "answer": "yes, there is"},
        {"question": "is there a popular?", "answer": "no"},
    ]
    write_json(tmp_path / "answers.json", rows, lines=True)
    found = scored(tmp_path / "answers.json", "pope", tmp_path)
    assert list(found["details"]["settings"]) == ["popular"] and (found["score"], found["n"]) == (100, 2)
    write_json(tmp_path / "answers.json", rows[::-1], lines=True)
    with pytest.raises(UserError, match="2 answers without question_id"):
        scored(tmp_path / "answers.json", "pope", tmp_path)


def test_one_setting_of_pope_alone_is_answered_by_its_own_ids(tmp_path: Path) -> None:
    LLAVA["pope"](tmp_path)
    for setting in ("popular", "adversarial"):
        (tmp_path / "pope" / "coco" / f"coco_pope_{setting}.json").unlink()
    assert {question.category for question in questions(["pope"], 1, tmp_path)} == {"random"}
    (tmp_path / "pope" / "llava_pope_test.jsonl").unlink()
    rows = [{"question_id": 1, "text": "Yes"}, {"question_id": 2, "text": "No"}]
    write_json(tmp_path / "answers.jsonl", rows, lines=True)
    assert scored(tmp_path / "answers.jsonl", "pope", tmp_path)["score"] == 100


def test_mmbench_takes_what_pandas_reads_as_empty_for_no_option(tmp_path: Path) -> None:
    row = {"index": "1", "question": "Which?", "hint": "N/A", "A": "Na", "B": "K", "C": "NULL", "answer": "A"}
    write_tsv(tmp_path / FILES["mmbench"], [{**row, "category": "x", "image": "1"}])
    (asked,) = questions(["mmbench"], 1, tmp_path)
    assert asked.options == ("Na", "K") and asked.prompt.startswith("Which?\nA. Na")


def test_vlmevalkits_number_takes_an_empty_cell_for_pandas_nan(tmp_path: Path) -> None:
    """An empty cell becomes the text "nan", in which the option "a" occurs."""
    row = {"index": "1", "question": "Which?", "A": "a", "B": "the red dog", "answer": "A", "prediction": ""}
    write_tsv(tmp_path / "model.tsv", [row, {**row, "index": "2", "prediction": "B"}])
    details = scored(tmp_path / "model.tsv", "scienceqa", None)["details"]
    assert details["vlmevalkit"] == "VLMEvalKit Overall 50.00" and details["all"] == 0


def test_an_absent_value_is_no_empty_text(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", [{"index": 1, "hint": None, "prediction": None, "C": float("nan"), "A": ""}])
    assert read_rows(tmp_path / "x.json") == [{"index": 1, "prediction": "", "A": ""}]
