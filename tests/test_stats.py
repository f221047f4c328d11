"""Intervals and comparisons hold what they promise."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_bench.evaluate import grade, score
from device_bench.power import least_error, needed_from, questions_needed, smallest_drop
from device_bench.resampling import interval, resampled_weights, wilson
from device_bench.stats import (
    holm,
    paired_difference,
    paired_seeds,
    sign_flips,
    t_interval,
    t_quantile,
)
from device_bench.tasks import scienceqa
from device_bench.tasks.base import BenchQuestion, Sample
from device_bench.tasks.scenes import questions
from vlm.errors import UserError

QUESTIONS = questions(40)


def answers(share: float, seed: int, questions: list[BenchQuestion] = QUESTIONS) -> list[Sample]:
    draw = random.Random(seed)
    return [
        grade(q, str(q.truth) if draw.random() < share else draw.choice(("Yes", "No", "A", "x"))) for q in questions
    ]


def plain(right: list[bool], per_image: int = 1) -> list[Sample]:
    asked = [BenchQuestion(str(n), f"{n // per_image}", "gqa", "k", "", str(n), "?", "yes") for n in range(len(right))]
    return [grade(q, "yes" if r else "no") for q, r in zip(asked, right, strict=True)]


def test_wilson_matches_the_textbook() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998
    assert wilson(0, 0) == (0.0, 1.0)


def flips(lost: int, won: int) -> tuple[float, float]:
    return sign_flips(np.array([-1] * lost + [1] * won + [0] * 7))


def test_sign_flips_of_single_questions_are_mcnemars_binomial_test() -> None:
    assert flips(0, 0) == (1.0, 1.0)
    assert flips(5, 5)[0] == flips(5, 5)[1] > 0.5
    assert flips(9, 1) == pytest.approx(((1 + 10) / 2**10, 1 - 1 / 2**10))
    assert flips(9, 1) == flips(1, 9)[::-1]
    assert 0 < flips(1100, 900)[0] < 1e-5


@given(changes=st.lists(st.integers(-4, 4), max_size=9))
@settings(max_examples=60, deadline=None)
def test_sign_flips_of_images_count_every_assignment_of_signs(changes: list[int]) -> None:
    sums = [sum(s * c for s, c in zip(signs, changes, strict=True)) for signs in product((-1, 1), repeat=len(changes))]
    low, high = (sum(test(s, sum(changes)) for s in sums) / len(sums) for test in (int.__le__, int.__ge__))
    assert sign_flips(np.array(changes, dtype=int)) == pytest.approx((low, high))


def test_holm_adjusts_in_steps() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_t_quantiles_match_the_table() -> None:
    for freedom, value in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423)):
        assert t_quantile(freedom) == pytest.approx(value, abs=2e-3)
    assert t_interval([1.0]) is None
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx(
        [2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)], abs=1e-3
    )


def test_resampled_weights_draw_within_strata_and_repeat() -> None:
    weights = resampled_weights(("a", "b", "b", "a", "a"), 50)
    assert (weights[:, [0, 3, 4]].sum(axis=1) == 3).all() and (weights[:, [1, 2]].sum(axis=1) == 2).all()
    assert (weights == resampled_weights(("a", "b", "b", "a", "a"), 50)).all()


def test_an_interval_without_spread_is_wilsons() -> None:
    low, high = interval(np.full(100, 100.0), 100.0, 20)
    assert 80 < low < 90 and high == 100


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    draw = random.Random(1)
    covered = 0
    for _ in range(100):
        low, high = score(plain([draw.random() < 0.7 for _ in range(300)]))["avg"]["ci95"]
        covered += low <= 70 <= high
    assert 88 <= covered <= 100


def test_answers_about_one_image_do_not_count_as_many() -> None:
    draw = random.Random(2)
    right = [verdict for _ in range(50) for verdict in [draw.random() < 0.6] * 6]
    together, apart = (score(plain(right, size))["avg"]["ci95"] for size in (6, 1))
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_a_model_does_not_differ_from_itself() -> None:
    samples = answers(0.6, 0)
    for found in paired_difference(samples, samples[::-1]).values():
        assert (found["points"], found["ci95"], found["p"]) == (0, [0, 0], 1)


def test_points_are_the_second_score_minus_the_first() -> None:
    first, second = answers(0.4, 0), answers(0.8, 1)
    found, scores = paired_difference(first, second), [score(s) for s in (first, second)]
    assert found["avg"]["points"] == pytest.approx(scores[1]["avg"]["score"] - scores[0]["avg"]["score"], abs=1e-3)
    assert found["avg"]["ci95"][0] > 0 and found["avg"]["p"] < 0.01
    assert (found["gqa"]["test"], found["scienceqa"]["test"]) == ("McNemar over images", "McNemar")


def test_pairing_sees_what_independent_intervals_do_not() -> None:
    draw = random.Random(3)
    before = [draw.random() < 0.7 for _ in range(1000)]
    after = [right and n % 40 != 0 for n, right in enumerate(before)]
    first, second = plain(before), plain(after)
    assert score(first)["avg"]["ci95"][0] < score(second)["avg"]["ci95"][1], "the intervals overlap"
    assert paired_difference(first, second)["gqa"]["ci95"][1] < 0


def test_other_questions_are_not_compared() -> None:
    samples = answers(0.5, 0)
    with pytest.raises(UserError, match="answered by one model only"):
        paired_difference(samples, samples[:-1])
    other = [*samples[:-1], grade(BenchQuestion(**{**QUESTIONS[-1].__dict__, "prompt": "other"}), "x")]
    with pytest.raises(UserError, match="another version of the data"):
        paired_difference(samples, other)
    with pytest.raises(UserError, match="twice"):
        paired_difference([*samples, samples[0]], samples)


def test_seeds_that_disagree_widen_the_interval() -> None:
    same = paired_seeds([(answers(0.5, 0), answers(0.7, 1))] * 3)["avg"]
    draw = [(answers(0.5, seed), answers(share, seed + 10)) for seed, share in enumerate((0.4, 0.7, 0.95))]
    spread = paired_seeds(draw)["avg"]
    assert spread["ci95"][1] - spread["ci95"][0] > 1.5 * (same["ci95"][1] - same["ci95"][0])
    assert spread["points"] == pytest.approx(np.mean(spread["seeds"]), abs=1e-3)
    assert spread["t_ci95"] is not None and spread["t_ci95"][0] < spread["points"] < spread["t_ci95"][1]


def test_one_seed_has_no_t_interval_and_seeds_need_the_same_questions() -> None:
    one = answers(0.5, 0), answers(0.7, 1)
    assert paired_seeds([one])["avg"]["t_ci95"] is None
    fewer = [[s for s in side if s.image != "scenes:950000"] for side in one]
    with pytest.raises(UserError, match="same questions"):
        paired_seeds([one, (fewer[0], fewer[1])])
    with pytest.raises(UserError, match="at least one seed"):
        paired_seeds([])


def test_answers_about_one_image_that_flip_together_are_weaker_evidence() -> None:
    before = [True] * 300
    after = [n >= 12 for n in range(300)]
    apart, together = (paired_difference(plain(before, size), plain(after, size))["gqa"] for size in (1, 6))
    assert apart["points"] == together["points"] == -4
    assert apart["p_drop"] == pytest.approx(2**-12) and together["p_drop"] == pytest.approx(2**-2)


def test_scienceqas_text_only_questions_do_not_count_in_its_test() -> None:
    asked = [BenchQuestion(str(n), f"{n}" if n < 20 else "", "scienceqa", "k", "", str(n), "?", "A") for n in range(60)]
    before = [grade(q, "A") for q in asked]
    after = [grade(q, "A" if q.image else "B") for q in asked]
    found = paired_difference(before, after)["scienceqa"]
    assert (found["points"], found["p"], found["n"]) == (0, 1, 20)


def test_the_one_sided_p_is_small_for_a_drop_only() -> None:
    worse, better = answers(0.4, 0), answers(0.8, 1)
    for name, found in paired_difference(better, worse).items():
        assert found["p_drop"] < 0.05 < paired_difference(worse, better)[name]["p_drop"]


def test_power_says_how_many_questions_a_drop_takes() -> None:
    assert questions_needed(2.0, 0.10) == math.ceil((1.6448536 + 1.6448536) ** 2 * (0.10 - 0.0004) / 0.0004)
    assert questions_needed(2.0, 0.05) < questions_needed(1.0, 0.05) < questions_needed(1.0, 0.2)
    before = [n % 10 < 7 for n in range(3000)]
    after = [right != (n % 25 == 0) for n, right in enumerate(before)]
    error = paired_difference(plain(before), plain(after))["gqa"]["error"]
    assert error == pytest.approx(100 * math.sqrt(0.04 / 3000), rel=0.1)
    assert needed_from(error, 3000, smallest_drop(error)) == 3000


def renamed(samples: list[Sample], name: Callable[[Sample], str]) -> list[Sample]:
    return [replace(sample, image=name(sample)) for sample in samples]


def test_runs_are_paired_by_sample_whatever_their_layouts_call_the_pictures() -> None:
    """Paths sort as 0, 1, 10, ...; a table's references otherwise; a result file knows no pictures at all."""
    before = [n % 3 != 0 for n in range(180)]
    first, lost = plain(before, 6), plain([right and n % 10 != 1 for n, right in enumerate(before)], 6)
    same = paired_difference(first, lost)
    for name in (lambda s: f"table#{999 - int(s.image)}", lambda s: "", lambda s: f"row {s.id}"):
        assert paired_difference(first, renamed(lost, name)) == same
        other = paired_difference(renamed(first, name), lost)["gqa"]
        assert {**other, "error": 0, "ci95": 0} == {**same["gqa"], "error": 0, "ci95": 0}
        assert other["error"] == pytest.approx(same["gqa"]["error"], rel=0.1), "the images are drawn in another order"
    assert same["gqa"]["p"] < 0.01


def test_a_scienceqa_run_that_lacks_image_questions_is_not_compared_with_a_whole_one() -> None:
    asked = [BenchQuestion(str(n), f"{n}", "scienceqa", "image", "", str(n), "?", "A") for n in range(9)]
    whole = [grade(q, "A") for q in asked]
    part = [*whole[:-1], grade(scienceqa.unanswered(asked[-1]), "FAILED")]
    assert paired_difference(part, part)["scienceqa"]["n"] == 8
    with pytest.raises(UserError, match="1 questions count in one run's score only"):
        paired_difference(whole, part)


def test_a_few_equal_answers_are_no_proof_that_nothing_changed() -> None:
    few, many = ([True] * 2, [True] * 3000)
    errors = [paired_difference(plain(right), plain(right))["gqa"]["error"] for right in (few, many)]
    assert errors == pytest.approx([50, 1 / 30], rel=1e-3)
    assert least_error(3000, 30) > least_error(3000, 3000)
    assert needed_from(errors[1], 3000, 2.0) == math.ceil(100 * smallest_drop(1.0) / 2.0)
