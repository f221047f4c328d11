"""The six families are scored as their authors score them: how answers are read, credited and summed."""

import pytest

from device_bench.evaluate import grade
from device_bench.tasks import gqa, mmbench, mme, pope, scienceqa, textvqa
from tests.answers import question


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("Red.", "red", 1),
        ("red ", "red", 0),
        ("the red", "red", 0),
        ("Yes", "yes", 1),
        ("red..", "red", 1),
        ("2", "two", 0),
    ],
)
def test_gqa_lowers_the_answer_and_drops_full_stops_and_nothing_else(answer: str, truth: str, right: int) -> None:
    assert gqa.correct(gqa.parse(answer), truth) == right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. a bird", "B"),
        ("The answer is B.", "B"),
        ("I think The answer is B because", "B"),
        ("The answer is B", "failed"),  # the original pattern wants one more character
        ("The answer is A. The answer is B.", "failed"),
        ("B.", "failed"),
        ("(B)", "failed"),
        ("b", "failed"),
        ("D", "failed"),  # only three options
        ("", "failed"),
    ],
)
def test_scienceqa_reads_letters_as_llava_does(answer: str, letter: str) -> None:
    assert scienceqa.parse(answer, ["x", "y", "z"]) == letter


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Cat", "cat"),
        ("Two dogs, none!", "2 dogs 0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("St. 3.5 U.S.", "st 3.5 us"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("black /white", "black white"),
        ("rock-n roll", "rock n roll"),
        ("coca -cola", "coca cola"),
        ("dog's", "dog 's"),
        ("." * 33 + "x", ".x"),
    ],
)
def test_textvqa_normalises_as_the_m4c_processor_does(answer: str, normal: str) -> None:
    assert textvqa.normalise(answer) == normal


def test_textvqa_credit_is_the_leave_one_out_mean() -> None:
    for given_by, credit in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        truth = ("Stop",) * given_by + tuple(f"other {n}" for n in range(10 - given_by))
        assert textvqa.correct(textvqa.parse("stop."), truth) == pytest.approx(credit)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("Yes", "yes"),
        ("yes, it is", "yes"),
        ("No.", "no"),
        ("not", "no"),
        ("Know", "no"),
        ("Sure", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_the_first_four_characters(answer: str, word: str) -> None:
    assert mme.parse(answer) == word


def test_mme_score_is_accuracy_plus_accuracy_over_pairs() -> None:
    answers = {"a": ("Yes", "No"), "b": ("Yes", "Yes")}
    samples = [
        grade(question("mme", truth, f"{image}{truth}", image=image, group=image, category="count"), answer)
        for image, said in answers.items()
        for truth, answer in zip(("Yes", "No"), said, strict=True)
    ]
    result = mme.score(samples)
    assert result["details"]["categories"]["count"] == {"acc": 75.0, "acc_plus": 50.0, "score": 125.0}
    assert result["details"]["perception"] == 125.0
    assert result["score"] == 62.5


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("No", "no"),
        ("There is no dog", "no"),
        ("It is not.", "no"),
        ("Yes. No.", "yes"),
        ("NO", "yes"),
        ("no\n", "yes"),
        ("", "yes"),
        ("No, there", "no"),
    ],
)
def test_pope_reads_the_first_sentence_as_the_original_does(answer: str, word: str) -> None:
    assert pope.parse(answer) == word


def test_pope_score_is_the_mean_f1_of_the_settings_and_chance_that_of_always_yes() -> None:
    said = {"random": [("yes", "Yes"), ("no", "No")], "popular": [("yes", "No"), ("no", "Yes")]}
    samples = [
        grade(question("pope", label, f"{setting}{n}", category=setting), answer)
        for setting, rows in said.items()
        for n, (label, answer) in enumerate(rows)
    ]
    result = pope.score(samples)
    assert result["score"] == 50.0
    assert result["chance"] == pytest.approx(200 / 3, abs=1e-3)
    assert result["details"]["settings"]["popular"]["accuracy"] == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) blue", "B"),
        ("The answer is B", "B"),
        ("blue", "B"),
        ("It is Blue", "B"),
        ("red or blue", "failed"),
        ("A or B", "failed"),
        ("Z", "refused"),
        ("D", "failed"),
        ("", "failed"),
    ],
)
def test_mmbench_reads_letters_and_option_texts_as_vlmevalkit_does(answer: str, letter: str) -> None:
    assert mmbench.parse(answer, ["red", "blue", "green"]) == letter


def test_mmbench_needs_every_rotation() -> None:
    options = ("red", "blue")
    asked = [
        question("mmbench", truth, f"{g}{truth}", group=g, image=g, options=options) for g in "xy" for truth in "AB"
    ]
    samples = [grade(one, "A" if one.id == "yB" else str(one.truth)) for one in asked]
    result = mmbench.score(samples)
    assert (result["score"], result["details"]["vanilla"], result["chance"]) == (50.0, 75.0, 25.0)


def test_chance_is_the_most_frequent_answer_per_kind_or_a_guess() -> None:
    truths = [("colour", "red"), ("colour", "red"), ("colour", "blue"), ("size", "big")]
    asked = [grade(question("gqa", truth, str(n), kind=kind), "") for n, (kind, truth) in enumerate(truths)]
    assert gqa.score(asked)["chance"] == 75.0
    choices = [grade(question("scienceqa", "A", str(n), options=("x",) * n), "") for n in (2, 4)]
    assert scienceqa.score(choices)["chance"] == 37.5
    texts = [grade(question("textvqa", truth, str(n)), "") for n, truth in enumerate(("cat", "dog", "cat", "sun"))]
    assert textvqa.score(texts)["chance"] == 50.0
