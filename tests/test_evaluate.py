"""Whole benchmarks: questions, grading, scores of published answers, and the files between them."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from device_bench import tasks
from device_bench.evaluate import evaluate, families, grade, load_answers, questions, save_answers, score, task
from device_bench.predictions import score_predictions
from device_bench.tasks import scienceqa
from device_bench.tasks.base import Sample, Truth
from tests.answers import question
from vlm.data.records import load_image
from vlm.data.scenes.question import FAMILIES
from vlm.errors import UserError

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
SCENES = 12


def needs(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here: third-party test data is not part of the project")
    return path


@pytest.mark.parametrize("family", FAMILIES)
@given(answer=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_text_breaks_a_scorer(family: str, answer: str) -> None:
    truth: Truth = ("cat",) * 4 + ("dog",) * 6 if family == "textvqa" else "A"
    sample = grade(question(family, truth, options=("cat", "dog")), answer)
    assert 0 <= sample.correct <= 1
    assert 0 <= score([sample])["avg"]["score"] <= 100


def answered(seed: int, share: float) -> list[Sample]:
    draw = random.Random(seed)
    asked = questions(["scenes"], SCENES)
    return [grade(q, str(q.truth) if draw.random() < share else draw.choice(("Yes", "No", "A", "x"))) for q in asked]


@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_the_order_of_samples_does_not_matter(seed: int, share: float) -> None:
    samples = answered(seed, share)
    shuffled = random.Random(seed).sample(samples, len(samples))
    assert score(samples)["avg"] == score(shuffled)["avg"]


@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_one_more_right_answer_never_lowers_a_score(seed: int, share: float) -> None:
    samples = answered(seed, share)
    place = random.Random(seed).randrange(len(samples))
    mended = grade(samples[place], str(samples[place].truth))
    before, after = (score([*samples[:place], one, *samples[place + 1 :]])["tasks"] for one in (samples[place], mended))
    assert after[mended.family]["score"] >= before[mended.family]["score"]


def test_the_truth_of_every_built_in_question_scores_100() -> None:
    accuracy = score([grade(q, str(q.truth)) for q in questions(["scenes"], SCENES)])
    assert {name: found["score"] for name, found in accuracy["tasks"].items()} == dict.fromkeys(FAMILIES, 100.0)
    assert all(found["ci95"][0] < 100 for found in accuracy["tasks"].values()), "a perfect score is not certain"
    assert all(found["chance"] < 70 for found in accuracy["tasks"].values())


def test_answers_survive_the_file(tmp_path: Path) -> None:
    samples = [*answered(0, 0.5), grade(question("textvqa", ("a b",) * 10), "ä\u2028b\n")]
    save_answers(samples, tmp_path / "answers.jsonl")
    assert load_answers(tmp_path / "answers.jsonl") == samples


def test_a_broken_answers_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    save_answers(answered(0, 0.5)[:2], path)
    path.write_text(path.read_text() + '{"id": 3}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:3"):
        load_answers(path)


def test_unknown_families_and_no_answers_are_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'gqa'"):
        task("gqaa")
    with pytest.raises(UserError, match="no answers"):
        score([])


def test_a_benchmark_that_only_grades_is_refused_as_questions() -> None:
    with pytest.raises(UserError, match="'pope' grades answers but brings no questions; scenes does"):
        questions(["pope"], 1)
    with pytest.raises(UserError, match="Did you mean 'scenes'"):
        questions(["scene"], 1)


def test_one_new_file_is_a_new_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "BenchQuestion(str(n), '', 'sums', 'k', '', str(n), f'{n} + 1?', str(n + 1))"
    (tmp_path / "sums.py").write_text(
        "from device_bench.tasks.base import BenchQuestion\n"
        "from device_bench.tasks.gqa import VERSION, correct, counts, parse, score, value\n"
        "def questions(count):\n"
        f"    return [{asked} for n in range(count)]\n"
    )
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    families.cache_clear()
    found = score([grade(q, str(q.truth)) for q in questions(["scenes", "sums"], 3)])
    assert found["tasks"]["sums"]["score"] == 100 and found["tasks"]["sums"]["n"] == 3
    families.cache_clear()


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    assert load_image("scenes:950000").size == (96, 96)
    (tmp_path / "x.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"x\.jpg"):
        load_image(str(tmp_path / "x.jpg"))


def test_scoring_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, device_bench.gate, device_bench.predictions; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == "set()", done.stderr


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
    said = {
        (s.category, Path(s.image).stem, " ".join(s.prompt.split(" Please answer")[0].split())): s.answer
        for s in samples
    }
    lines = []
    for row in map(json.loads, needs("mme", "llava_mme.jsonl").read_text().splitlines()):
        asked = " ".join(row["text"].split("\n")[0].split())
        key = row["category"], Path(row["image"]).stem, asked
        lines.append({"question_id": row["question_id"], "prompt": row["text"], "text": said.get(key, "")})
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, _ = score_predictions(path, "mme", folder)
    assert again["tasks"]["mme"]["details"]["perception"] == details["perception"]
    assert again["tasks"]["mme"]["details"]["data"] == {"questions": 2370, "left_out": 4}


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 99999, "text": "No"}\n')
    with pytest.raises(UserError, match="99999"):
        score_predictions(path, "pope", needs("pope"))
    with pytest.raises(UserError, match="Did you mean 'pope'"):
        score_predictions(path, "popee", tmp_path)


def test_grading_again_changes_nothing() -> None:
    samples = answered(3, 0.5)
    assert [grade(replace(s, parsed="", correct=0.0), s.answer) for s in samples] == samples


class Echo:
    """A model that answers with the number of pictures it has encoded so far."""

    def __init__(self) -> None:
        self.encoded = 0

    def pixels(self, image: Image.Image) -> Image.Image:
        return image

    def encode_image(self, pixels: Image.Image) -> int:
        self.encoded += 1
        return self.encoded

    def answer(self, image: None, question: str, max_new_tokens: int, vision: int | None) -> SimpleNamespace:
        return SimpleNamespace(text=f"{vision}")


def test_each_image_is_encoded_once_for_all_its_questions_and_none_without_one() -> None:
    asked = [*questions(["scenes"], 2), question("scienceqa", "A", image="")]
    seen: list[tuple[int, int]] = []
    samples = evaluate(Echo(), asked, 4, on_progress=lambda *place: seen.append(place))  # type: ignore[arg-type]
    assert [(s.image, s.answer) for s in samples] == [
        (q.image, {"scenes:950000": "1", "scenes:950001": "2", "": "None"}[q.image]) for q in asked
    ]
    assert seen[-1] == (len(asked), len(asked)) and [s.id for s in samples] == [q.id for q in asked]
