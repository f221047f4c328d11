"""Published answers score as published; every layout that people have on disk is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_bench import vlmevalkit
from device_bench.evaluate import UNKNOWN_LINE, grade, questions, versions
from device_bench.pictures import load_picture
from device_bench.predictions import score_predictions
from device_bench.records import is_ours, read_header, read_records, write_records
from device_bench.rows import read_rows
from device_bench.subset import subset
from device_bench.tasks import scienceqa
from tests.answers import question
from tests.layouts import FILES, LLAVA, TABLES, asked_with, predicted, write_json, write_tsv, write_xlsx
from vlm.data.scenes.question import FAMILIES
from vlm.errors import UserError

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def needs(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here: third-party test data is not part of the project")
    return path


def test_pope_answers_of_llava_13b_score_as_published() -> None:
    accuracy, _ = score_predictions(needs("pope", "llava15_13b_answers.jsonl"), "pope", needs("pope"))
    found = accuracy["tasks"]["pope"]
    f1 = {setting: round(row["f1"], 2) for setting, row in found["details"]["settings"].items()}
    assert round(found["score"], 2) == 85.95
    assert f1 == {"random": 87.14, "popular": 86.25, "adversarial": 84.46}
    assert found["details"]["data"]["labels"]["random"] == 2910


def test_scienceqa_answers_of_llava_13b_score_as_published(tmp_path: Path) -> None:
    source = needs("scienceqa", "llava15_13b_output.jsonl")
    tree = json.loads(source.read_text())
    lines = [{"question_id": row["question_id"], "text": row["pred"]} for part in tree.values() for row in part]
    plain = tmp_path / "answers.jsonl"
    plain.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for predictions in (source, plain):
        accuracy, samples = score_predictions(predictions, "scienceqa", needs("scienceqa"))
        found = accuracy["tasks"]["scienceqa"]
        assert (round(found["score"], 2), round(found["details"]["all"], 2), found["n"]) == (71.64, 74.39, 2017)
    assert all(str(sample.truth) in scienceqa.LETTERS[: len(sample.options)] for sample in samples)


def test_mme_example_results_score_as_the_official_tool_does(tmp_path: Path) -> None:
    folder = needs("mme", "lavin")
    accuracy, samples = score_predictions(folder, "mme", folder)
    details = accuracy["tasks"]["mme"]["details"]
    assert (round(details["perception"], 2), round(details["cognition"], 2)) == (963.29, 249.64)
    assert details["categories"]["existence"] == {"acc": 95.0, "acc_plus": 90.0, "score": 185.0}
    said = {(s.category, Path(s.image).stem, s.prompt.split("\n")[0]): s.answer for s in samples}
    lines = []
    for row in map(json.loads, needs("mme", "llava_mme.jsonl").read_text().splitlines()):
        asked = row["text"].split("\n")[0]
        key = row["category"], Path(row["image"]).stem, asked
        lines.append({"question_id": row["question_id"], "prompt": row["text"], "text": said.get(key, "")})
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, _ = score_predictions(path, "mme", folder)
    assert again["tasks"]["mme"]["details"]["perception"] == details["perception"]
    assert again["tasks"]["mme"]["details"]["data"]["left_out"] == 4


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 99999, "text": "No"}\n')
    with pytest.raises(UserError, match="99999"):
        score_predictions(path, "pope", needs("pope"))
    with pytest.raises(UserError, match="Did you mean 'pope'"):
        score_predictions(path, "popee", tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_llavas_layout_is_read_and_right_answers_score_100(family: str, tmp_path: Path) -> None:
    rows = LLAVA[family](tmp_path)
    answers = tmp_path / "answers.jsonl"
    write_json(answers, rows, lines=True)
    for data in (tmp_path, next(path for path in tmp_path.iterdir() if path.is_dir())):
        accuracy, samples = score_predictions(answers, family, data)
        assert accuracy["tasks"][family]["score"] == 100 and len(samples) == len(rows)
        assert all(load_picture(sample.image).size == (8, 6) for sample in samples if sample.image)
        assert all(sample.prompt.endswith(asked_with(family)) for sample in samples)
        assert accuracy["tasks"][family]["details"]["line"].split(" ")[0].lower() == family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", ["jsonl", "tsv", "shared.xlsx", "inline.xlsx"])
def test_vlmevalkits_results_are_read_with_and_without_its_table(family: str, suffix: str, tmp_path: Path) -> None:
    rows, path = predicted(family), tmp_path / f"model_{family}.{suffix}"
    if suffix == "tsv":
        write_tsv(path, rows)
    elif suffix == "jsonl":
        write_json(path, rows, lines=True)
    else:
        write_xlsx(path, rows, shared="shared" in suffix)
    alone, _ = score_predictions(path, family, None)
    assert "00.00" in alone["tasks"][family]["details"]["vlmevalkit"]
    write_tsv(tmp_path / "LMUData" / FILES[family], TABLES[family])
    beside, _ = score_predictions(path, family, tmp_path)
    assert alone["tasks"][family]["score"] == beside["tasks"][family]["score"] == 100


@pytest.mark.parametrize("family", FAMILIES)
def test_vlmevalkits_table_is_asked_with_its_pictures(family: str, tmp_path: Path) -> None:
    write_tsv(tmp_path / FILES[family], TABLES[family])
    asked = questions([family], 1, tmp_path)
    assert {load_picture(question.image).size for question in asked} == {(8, 6)}
    assert len({question.image for question in asked}) == 1, "equal pictures are one image"
    assert all(question.prompt.endswith(asked_with(family)) for question in asked)
    assert versions(asked)[family]["questions"] == len(asked)


@pytest.mark.parametrize(
    ("answer", "word"),
    [("Yes.", "yes"), ("No, not at all", "no"), ("yes and no", "unknown"), ("nope", "unknown"), ("It is-yes", "yes")],
)
def test_vlmevalkit_reads_yes_and_no_as_words(answer: str, word: str) -> None:
    assert vlmevalkit.yes_or_no(answer) == word


def test_where_vlmevalkit_and_the_authors_differ_both_numbers_are_given(tmp_path: Path) -> None:
    said = {"gqa": ["red."], "scienceqa": ["(B)"], "pope": ["", ""], "mme": ["I say yes", "no"]}
    lines = {}
    for family, texts in said.items():
        rows = [{**row, "prediction": text} for row, text in zip(predicted(family), texts, strict=True)]
        write_json(tmp_path / f"{family}.jsonl", rows, lines=True)
        found = score_predictions(tmp_path / f"{family}.jsonl", family, None)[0]["tasks"][family]
        lines[family] = (found["details"]["line"].removesuffix(UNKNOWN_LINE), found["details"]["vlmevalkit"])
    assert lines == {
        "gqa": ("GQA accuracy 100.00", "VLMEvalKit Overall 0.00"),
        "scienceqa": ("ScienceQA IMG-Accuracy 0.00, Accuracy 0.00", "VLMEvalKit Overall 100.00"),
        "pope": ("POPE F1 66.67 (popular 66.67, random 66.67)", "VLMEvalKit Overall 0.00"),
        "mme": ("MME perception 50.00, cognition 0.00", "VLMEvalKit perception 200.00, reasoning 0.00"),
    }


@given(answer=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_no_text_breaks_vlmevalkits_rules(answer: str) -> None:
    for family in FAMILIES:
        assert vlmevalkit.line(family, [grade(question(family, "Yes", options=("x", "y")), answer)])


def test_a_result_without_answers_needs_the_table(tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("index", "prediction")} for row in predicted("mmbench")]
    path = tmp_path / "result.jsonl"
    write_json(path, rows, lines=True)
    with pytest.raises(UserError, match=r"no column 'answer'.*MMBench_DEV_EN\.tsv"):
        score_predictions(path, "mmbench", None)
    write_tsv(tmp_path / FILES["mmbench"], TABLES["mmbench"])
    assert score_predictions(path, "mmbench", tmp_path)[0]["tasks"]["mmbench"]["score"] == 100


def test_an_official_scienceqa_folder_gives_llavas_prompts(tmp_path: Path) -> None:
    problem: dict[str, Any] = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "So.", "image": None}
    write_json(tmp_path / "problems.json", {"1": problem, "2": {**problem, "hint": "", "image": "image.png"}, "3": {}})
    write_json(tmp_path / "pid_splits.json", {"test": ["1", "2"], "train": ["3"]})
    first, second = questions(["scienceqa"], 1, tmp_path)
    assert first.prompt.startswith("Context: So.\nWhich?\nA. x\nB. y\nAnswer") and (first.truth, first.image) == (
        "B",
        "",
    )
    assert second.prompt.startswith("Which?\nA. x") and second.image.endswith("2/image.png")


def test_scienceqas_official_files_equal_llavas_prompt_file() -> None:
    shared = questions(["scienceqa"], 1, needs("scienceqa"))
    assert versions(shared)["scienceqa"]["edition"] == "test split"
    assert sum(bool(q.image) and Path(q.image).is_file() for q in shared) == 2017


def test_popes_editions_are_told_apart_and_not_mixed(tmp_path: Path) -> None:
    found = versions(questions(["pope"], 1, needs("pope")))["pope"]
    assert all("e3e3926" in name for name in found["edition"].values()) and found["labels"]["random"] == 2910
    rows = LLAVA["pope"](tmp_path)
    write_json(tmp_path / "answers.jsonl", rows, lines=True)
    assert set(versions(questions(["pope"], 1, tmp_path))["pope"]["edition"].values()) == {"unknown"}
    write_json(tmp_path / "pope" / "coco" / "coco_pope_random.json", [], lines=True)
    with pytest.raises(UserError, match="another version of POPE"):
        score_predictions(tmp_path / "answers.jsonl", "pope", tmp_path)


@pytest.mark.parametrize(
    ("family", "row", "missing"),
    [
        ("pope", {"text": "No"}, "question_id"),
        ("gqa", {"question_id": "7"}, "text"),
        ("mme", {"question_id": "count/0001.png", "text": "Yes"}, "prompt"),
        ("mmbench", {"text": "A"}, "question_id"),
    ],
)
def test_a_row_that_lacks_a_field_is_named(family: str, row: dict[str, str], missing: str, tmp_path: Path) -> None:
    LLAVA[family](tmp_path)
    write_json(tmp_path / "answers.jsonl", [row], lines=True)
    with pytest.raises(UserError, match=rf"answer 1: no '{missing}'"):
        score_predictions(tmp_path / "answers.jsonl", family, tmp_path)


def test_an_unfinished_run_is_refused_but_in_scienceqa_counts_as_wrong(tmp_path: Path) -> None:
    for family in ("gqa", "scienceqa"):
        write_json(tmp_path / f"{family}.jsonl", LLAVA[family](tmp_path)[:1], lines=True)
    with pytest.raises(UserError, match="1 of the 2 questions"):
        score_predictions(tmp_path / "gqa.jsonl", "gqa", tmp_path)
    accuracy, _ = score_predictions(tmp_path / "scienceqa.jsonl", "scienceqa", tmp_path)
    assert accuracy["tasks"]["scienceqa"]["details"]["all"] == 50
    assert accuracy["tasks"]["scienceqa"]["details"]["data"]["unanswered"] == 1


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a": 1}\n{', "\x00"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "tsv", "xlsx"])
def test_a_file_that_holds_no_answers_is_the_users_to_change(text: str, suffix: str, tmp_path: Path) -> None:
    LLAVA["gqa"](tmp_path)
    path = tmp_path / f"answers.{suffix}"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"answers\.{suffix}"):
        score_predictions(path, "gqa", tmp_path)


def test_data_that_is_not_there_is_named_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"testdev_balanced_questions\.json or GQA_TestDev_Balanced\.tsv"):
        questions(["gqa"], 1, tmp_path)


def test_a_subset_is_stratified_keeps_groups_whole_and_repeats(tmp_path: Path) -> None:
    LLAVA["pope"](tmp_path)
    LLAVA["mmbench"](tmp_path)
    asked = questions(["pope", "mmbench"], 1, tmp_path)
    drawn = subset(asked, 3, seed=1)
    assert drawn == [question for question in asked if question in subset(asked[::-1], 3, seed=1)]
    assert sorted(question.category for question in drawn if question.family == "pope") == [
        "adversarial",
        "popular",
        "random",
    ]
    groups = [question.group for question in drawn if question.family == "mmbench"]
    assert groups and all(groups.count(group) == 2 for group in groups)
    assert subset(asked, 100, seed=0) == asked


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_records_survive_their_file(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    rows = LLAVA["textvqa"](tmp_path) + LLAVA["scienceqa"](tmp_path)
    write_json(tmp_path / "t.jsonl", rows[:1], lines=True)
    write_json(tmp_path / "s.jsonl", rows[1:], lines=True)
    samples = [
        s for n in ("textvqa", "scienceqa") for s in score_predictions(tmp_path / f"{n[0]}.jsonl", n, tmp_path)[1]
    ]
    path = tmp_path / "deep" / name
    write_records(samples, path, {"model": "m"})
    assert read_records(path) == samples and is_ours(path)
    assert read_header(path) == ({"model": "m"} if name.endswith("parquet") else {})
    assert not is_ours(tmp_path / "t.jsonl")


def test_llavas_scienceqa_result_and_pandas_empty_cells_are_read(tmp_path: Path) -> None:
    rows = LLAVA["scienceqa"](tmp_path)
    write_json(tmp_path / "x_result.json", {"acc": 1.0, "outputs": {row["question_id"]: row["text"] for row in rows}})
    assert score_predictions(tmp_path / "x_result.json", "scienceqa", tmp_path)[0]["avg"]["score"] == 100
    path = tmp_path / "kit.json"
    path.write_text(json.dumps([{**predicted("scienceqa")[0], "C": float("nan"), "hint": None}]))
    (sample,) = score_predictions(path, "scienceqa", None)[1]
    assert sample.options == ("x", "y") and sample.prompt.startswith("Which?")


def test_a_table_may_have_any_name(tmp_path: Path) -> None:
    write_tsv(tmp_path / "mine.tsv", TABLES["gqa"])
    assert len(questions(["gqa"], 1, tmp_path / "mine.tsv")) == 1


def test_a_number_in_a_workbook_and_an_empty_cell_are_read(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "x.xlsx", [{"index": 3, "A": "x", "B": ""}, {"index": 1000003, "B": "<b>"}], shared=True)
    assert read_rows(tmp_path / "x.xlsx") == [{"index": "3", "A": "x"}, {"index": "1000003", "B": "<b>"}]
