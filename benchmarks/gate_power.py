"""How often the gate calls a regression: `python -m benchmarks.gate_power`.

Simulated pairs of runs of 3,000 independent answers, 70 % of them right. Of the answers a share changes sides; without
a drop as often to right as to wrong, with one of 2 points that much more often to wrong.
"""

import argparse
import sys
from functools import cache
from typing import Any

import numpy as np

from device_bench.evaluate import grade
from device_bench.judge import Allowances
from device_bench.judge_accuracy import Compared, accuracy_checks
from device_bench.stats import paired_difference
from device_bench.tasks.base import BenchQuestion, Sample

ANSWERS, RIGHT, DROP, RUNS = 3000, 0.7, 2.0, 100
DISAGREEMENTS = (0.03, 0.05, 0.08, 0.10, 0.12)
_SCORE: Any = {"avg": {"score": 0.0}, "tasks": {"gqa": {"score": 0.0}}}  # the gate judges differences, not scores


@cache
def _sample(number: int, right: bool) -> Sample:
    question = BenchQuestion(str(number), f"image {number}", "gqa", "k", "", str(number), "?", "yes")
    return grade(question, "yes" if right else "no")


def difference(name: str, disagreement: float, drop: float, seed: int) -> Compared:
    """One simulated pair of runs, compared.

    Args:
        name: what the comparison is called.
        disagreement: share of the answers that change sides.
        drop: points by which the second run is worse on average over seeds.
        seed: of this pair.
    """
    draw = np.random.default_rng([seed, round(1e4 * disagreement), round(1e4 * drop)])
    lost, won = (disagreement + sign * drop / 100 for sign in (1, -1))
    before, change = draw.random(ANSWERS) < RIGHT, draw.random(ANSWERS)
    after = np.where(before, change >= lost / 2 / RIGHT, change < won / 2 / (1 - RIGHT))
    pair = [[_sample(n, bool(right)) for n, right in enumerate(run)] for run in (before, after)]
    return Compared(name, _SCORE, _SCORE, paired_difference(*pair), "paired", [])


def alarms(disagreement: float, drop: float, runs: int) -> int:
    """In how many of `runs` simulated pairs the gate's default allowances call a regression."""
    judged = (accuracy_checks([difference("x", disagreement, drop, seed)], Allowances()) for seed in range(runs))
    return sum(any(check.state == "regression" for check in checks) for checks in judged)


def main() -> None:
    """Print the table of docs/benchmarks.md; exit 1 where the bar is missed at 5 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    runs = parser.parse_args().runs
    rows = {share: (alarms(share, DROP, runs), alarms(share, 0.0, runs)) for share in DISAGREEMENTS}
    print(f"regressions called in {runs} pairs of runs with {ANSWERS} answers")
    print(f"{'disagreement':>12}  {f'drop of {DROP:g}':>12}  {'equal':>8}")
    for share, (caught, false) in rows.items():
        print(f"{share:>12.0%}  {caught:>12}  {false:>8}")
    caught, false = rows[0.05]
    sys.exit(not (caught >= 0.95 * runs and false <= 0.05 * runs))


if __name__ == "__main__":
    main()
