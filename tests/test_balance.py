"""Weights follow their rules; a term that does nothing or collapses is said, one without a gradient ends a run."""

import pytest

from distill.terms import LogitsTerm, Weight
from distill.training.balance import DEAD_PROBES, Row, reports, stop_if_dead
from vlm.errors import CheckFailed, UserError


def _probes(values: list[float], norm: float) -> list[Row]:
    sup = {"value": 1.0, "grad_norm": 1.0, "weight": 1.0}
    return [{"sup": sup, "attention": {"value": v, "grad_norm": norm, "weight": 1.0}} for v in values]


def _history(values: list[float], norm: float) -> list[dict]:
    return [{"terms": row} for row in _probes(values, norm)]


def test_a_term_that_does_nothing_or_collapses_is_reported() -> None:
    assert "does nothing" in reports(_history([1e-3, 9e-4], norm=1e-4), ["attention"])[0]
    assert "collapsed" in reports(_history([1e-3, 1e-12], norm=0.3), ["attention"])[0]
    assert reports(_history([1.0, 0.5], norm=0.3), ["attention"]) == []
    assert "vision term never" in reports(_history([1.0, 0.5], norm=0.3), ["attention", "vision"])[0]


def test_a_gradient_that_stays_zero_stops_the_run() -> None:
    stop_if_dead(_probes([0.0] * (DEAD_PROBES - 1), norm=0.0))
    stop_if_dead(_probes([0.0] * DEAD_PROBES, norm=1e-6))
    with pytest.raises(CheckFailed, match=r"attention term has no gradient.*\n.*stop_dead_terms=false"):
        stop_if_dead(_probes([0.0] * DEAD_PROBES, norm=0.0))
    text = [{"sup": {"value": 1.0, "grad_norm": 1.0, "weight": 1.0}}] * 5  # batches without an image
    stop_if_dead(_probes([0.1], norm=0.0) + text)


def test_a_value_that_collapses_stops_the_run() -> None:
    stop_if_dead(_probes([1e-3, 1e-6], norm=0.3))
    with pytest.raises(CheckFailed, match=r"fell from 1.00e-03 to 9.00e-11"):
        stop_if_dead(_probes([1e-3, 1e-6, 9e-11], norm=0.3))


@pytest.mark.parametrize("two", [{"fixed": 1.0, "share": 0.3}, {"share": 0.3, "learned": 1.0}])
def test_a_weight_follows_one_rule(two: dict) -> None:
    with pytest.raises(UserError, match="follows one rule"):
        Weight.parse(two, "test")


def test_a_weight_falls_linearly_to_zero() -> None:
    fading = Weight(until=0.5)
    assert [fading.fade(x) for x in (0.0, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.0, 0.0]
    assert Weight().fade(1.0) == 1.0 and Weight().start == 1.0


def test_a_mixture_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match="reverse_kl has none"):
        LogitsTerm.parse({"mixture": 0.5}, "test")
    assert LogitsTerm(distance="jsd").part == 0.5 and LogitsTerm(distance="skew_kl").part == 0.1
