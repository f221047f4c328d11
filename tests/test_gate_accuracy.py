"""What the gate makes of accuracies: drops are caught, noise raises no alarm, flipped answers are shown."""

import random
from dataclasses import replace

import pytest

from benchmarks.gate_power import SEVERAL, alarms, difference
from device_bench.credits import pack, unpack
from device_bench.evaluate import grade, questions, score
from device_bench.gate import Verdict
from device_bench.gate_output import markdown, page
from device_bench.judge import Allowances
from device_bench.judge_accuracy import Compared, accuracy_checks, flips
from device_bench.stats import paired_difference
from device_bench.tasks.base import BenchQuestion
from vlm.errors import UserError


def test_a_drop_of_two_points_is_caught_and_equal_models_raise_no_alarm() -> None:
    """A quarter of `python -m benchmarks.gate_power`, which counts 100 runs of each."""
    assert alarms(0.05, drop=2.0, runs=25) == 25
    assert alarms(0.05, drop=0.0, runs=25) <= 1
    assert alarms(0.05, drop=2.0, runs=10, families=SEVERAL) == 10


def test_a_benchmarks_drop_within_the_noise_is_no_reason_where_large_drops_are_seen() -> None:
    """The average dropped by less than its allowance, one benchmark by more, neither beyond the noise."""
    noisy = difference("x", 0.4, drop=2.0, seed=5, families=SEVERAL)
    gqa, average = noisy.found["gqa"], noisy.found["avg"]
    assert gqa["points"] < -1 < average["points"] and gqa["p_drop"] > 0.01
    checks = {check.metric: check for check in accuracy_checks([noisy], Allowances())}
    assert checks["gqa"].state == "pass" and checks["gqa"].why.endswith("within the noise")
    blind = {check.metric: check for check in accuracy_checks([noisy], Allowances(must_see=3.0))}
    assert blind["gqa"].state == "cannot judge" and "only drops of" in blind["gqa"].why


def test_the_average_of_one_benchmark_is_that_benchmark() -> None:
    one = difference("x", 0.05, drop=2.0, seed=0)
    assert one.found["avg"] == one.found["gqa"] and one.found["avg"]["test"] == "McNemar"


def test_credits_of_every_family_give_the_score_back() -> None:
    draw = random.Random(0)
    asked = questions(["scenes"], 6)
    given = [grade(q, str(q.truth) if draw.random() < 0.6 else draw.choice(("Yes", "No", "A", "x"))) for q in asked]
    other = [grade(q, "x") for q in asked]
    restored = score(unpack(pack(given), other))
    plain = score(given)
    assert {k: v["score"] for k, v in restored["tasks"].items()} == {k: v["score"] for k, v in plain["tasks"].items()}
    with pytest.raises(UserError, match="other questions"):
        unpack(pack(given), other[:-1])


def test_flipped_answers_are_shown_with_their_pictures() -> None:
    asked = questions(["scenes"], 2)
    given = [grade(q, str(q.truth)) for q in asked]
    spoiled = [grade(q, "<b>x") if n < 3 else sample for n, (q, sample) in enumerate(zip(asked, given, strict=True))]
    flipped = flips("x", given, spoiled)
    compared = Compared("x", score(given), score(spoiled), paired_difference(given, spoiled), "paired", flipped)
    verdict = Verdict(accuracy_checks([compared], Allowances()), [], [], [compared])
    html, text = page(verdict), markdown(verdict)
    assert html.count("data:image/jpeg;base64,") == 3 and "&lt;b&gt;x" in html and "<b>x" not in html
    assert "x: 3 answers lost, 0 won" in text and text.count("| gqa ") + text.count("| textvqa ") >= 1
    assert all(flip.points == -1 for flip in flipped)


def test_a_drop_in_one_of_many_artifacts_is_corrected_for_looking_at_all() -> None:
    worse = difference("worse", 0.05, drop=1.0, seed=0)
    same = difference("same", 0.05, drop=0.0, seed=1)
    strict = Allowances(max_drop=0.2)
    one, many = [worse], [worse, *(replace(same, where=str(n)) for n in range(500))]
    assert [accuracy_checks(entries, strict)[0].state for entries in (one, many)] == ["regression", "cannot judge"]


def judged(before: list[bool], after: list[bool]) -> tuple[str, str]:
    """State and reason of the average, of runs of one benchmark with the default allowances."""
    asked = [BenchQuestion(str(n), str(n), "gqa", "k", "", str(n), "?", "yes") for n in range(len(before))]
    runs = [[grade(q, "yes" if r else "no") for q, r in zip(asked, run, strict=True)] for run in (before, after)]
    pair = Compared("x", dict(score(runs[0])), dict(score(runs[1])), paired_difference(*runs), "paired", [])
    check = next(check for check in accuracy_checks([pair], Allowances()) if check.metric == "average")
    return check.state, check.why


def test_two_equal_answers_cannot_be_judged_and_many_can() -> None:
    state, why = judged([True] * 2, [True] * 2)
    assert state == "cannot judge" and "only drops of" in why
    assert judged([True] * 300, [True] * 300)[0] == "pass"


def test_a_clear_improvement_passes_however_few_the_answers() -> None:
    before = [n % 2 == 0 for n in range(60)]
    assert judged(before, [True] * 60)[0] == "pass", "half of the answers changed, all for the better"
    assert judged([True] * 60, before)[0] == "regression"
