"""Whole benchmarks: questions, grading, scores of published answers, and the files between them."""

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
from device_bench.evaluate import (
    UNKNOWN_LINE,
    evaluate,
    families,
    grade,
    load_answers,
    publish,
    questions,
    save_answers,
    score,
    task,
)
from device_bench.tasks.base import Sample, Truth
from tests.answers import question
from vlm.data.records import load_image
from vlm.data.scenes.question import FAMILIES
from vlm.errors import UserError

SCENES = 12


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


def test_grading_again_changes_nothing() -> None:
    samples = answered(3, 0.5)
    assert [grade(replace(s, parsed="", correct=0.0), s.answer) for s in samples] == samples


class Echo:
    """A model that answers with the number of pictures it has encoded so far; its context holds 400 characters."""

    def __init__(self) -> None:
        self.encoded = 0
        self.facts = SimpleNamespace(context_length=400)

    def prompt(self, question: str, has_image: bool) -> str:
        return question

    def pixels(self, image: Image.Image) -> Image.Image:
        return image

    def encode_image(self, pixels: Image.Image) -> int:
        self.encoded += 1
        return self.encoded

    def answer(self, image: None, question: str, max_new_tokens: int, vision: int | None) -> SimpleNamespace:
        return SimpleNamespace(text=f"{vision}", tokens=[0])


def test_each_image_is_encoded_once_for_all_its_questions_and_none_without_one() -> None:
    asked = [*questions(["scenes"], 2), question("scienceqa", "A", image="")]
    seen: list[tuple[int, int]] = []
    samples = evaluate(Echo(), asked, 4, on_progress=lambda *place: seen.append(place))  # type: ignore[arg-type]
    assert [(s.image, s.answer) for s in samples] == [
        (q.image, {"scenes:950000": "1", "scenes:950001": "2", "": "None"}[q.image]) for q in asked
    ]
    assert seen[-1] == (len(asked), len(asked)) and [s.id for s in samples] == [q.id for q in asked]


def test_a_prompt_that_does_not_fit_is_not_asked_and_counted() -> None:
    asked = [
        question("scienceqa", "A", "short", image=""),
        question("scienceqa", "A", "long", image="", prompt="w" * 500),
    ]
    samples = evaluate(Echo(), asked, 4)  # type: ignore[arg-type]
    assert samples[0].problem == "" and samples[1].answer == ""
    assert samples[1].problem == "the prompt has 500 tokens, the context holds 400"
    assert score(samples)["tasks"]["scienceqa"]["details"]["unasked"] == 1


@pytest.mark.parametrize(("edition", "asked", "marked"), [("x", 1, False), ("x", 2, True), ("unknown: 1", 1, True)])
def test_the_line_of_a_part_is_no_published_one(edition: str, asked: int, marked: bool) -> None:
    samples = [grade(question("gqa", "red"), "red")]
    found = publish(score(samples), {"gqa": {"edition": edition, "questions": asked}})
    assert found["tasks"]["gqa"]["details"]["line"] == "GQA accuracy 100.00" + UNKNOWN_LINE * marked
