"""Comparing two models on the same questions: paired differences, exact tests, several seeds. NumPy only.

Everywhere `a` is what was there before (baseline, undistilled) and `b` what is judged; points = score(b) - score(a).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, TypedDict, TypeVar

import numpy as np

from device_bench.evaluate import ImageSums
from device_bench.power import least_error
from device_bench.resampling import LEVEL, bootstrap_p, percentiles, resampled_weights
from device_bench.tasks.base import Sample, cluster
from vlm.errors import UserError

Key = TypeVar("Key", bound=Hashable)
# Families whose score is the mean of the answers' credits, so that sign flips of whole images are an exact test.
EXACT = ("gqa", "scienceqa", "textvqa")
SEED_RESAMPLES = 10_000  # so many that p of one of many rows (Holm) can be small
MCNEMAR, CLUSTERED, BOOTSTRAP = "McNemar", "McNemar over images", "bootstrap over images"
SAME = ("prompt", "truth", "options", "category", "group")  # of a question, in every layout of a benchmark
CREDIT_STEPS = 10  # credits are whole multiples of 1 / CREDIT_STEPS


class Difference(TypedDict):
    """A paired difference in points of percent.

    `p` is two-sided, `p_drop` one-sided: how likely a drop as large as this one is where nothing got worse. `error` is
    the standard error in points, never below power.least_error; `test` names what gave the p values, and `n` counts the
    answers that are scored.
    """

    points: float
    ci95: list[float]
    p: float
    p_drop: float
    error: float
    test: str
    n: int


class SeedDifference(TypedDict):
    """Mean difference over seeds: hierarchical bootstrap, Student's t interval (None for one seed), each seed."""

    points: float
    ci95: list[float]
    p: float
    t_ci95: list[float] | None
    seeds: list[float]


def paired_difference(a: Sequence[Sample], b: Sequence[Sample]) -> dict[str, Difference]:
    """Compare two models' answers to the same questions.

    Args:
        a: answers of the first model.
        b: answers of the second, in any order.
    Returns:
        For "avg" and each family the points b - a with the 95 % interval of a bootstrap over images that draws the same
        images for both. The p values are exact for plain accuracies, else from the bootstrap: McNemar's test where
        every image has one question, and the same with whole images in place of questions where some have more. The
        average of one family is that family.
    Raises:
        UserError: the questions are not the same.
    """
    a, b = pair(a, b)
    first, second = ImageSums(a), ImageSums(b)
    weights = resampled_weights(first.strata)  # [R, I]
    resampled = _differences(first, second, weights)
    plain = _differences(first, second, np.ones((1, len(first.images))))
    floors = _floors(first, a)
    result: dict[str, Difference] = {}
    for name, values in resampled.items():
        points, error = float(plain[name][0]), max(float(np.std(values, ddof=1)), floors[name])
        if name in EXACT:
            _same_subset(name, first.sums[name], second.sums[name])
            changes = np.rint(CREDIT_STEPS * (second.sums[name][:, 0] - first.sums[name][:, 0])).astype(int)  # [I]
            not_worse, not_better = sign_flips(changes)
            p, p_drop = min(1.0, 2 * min(not_worse, not_better)), not_worse
            scored = int(first.sums[name][:, 1].sum())
            test = MCNEMAR if first.sums[name][:, 1].max() <= 1 else CLUSTERED
        else:
            p, p_drop, test = bootstrap_p(values), normal_p_drop(points, error), BOOTSTRAP
            scored = sum(name in ("avg", sample.family) for sample in a)
        result[name] = {
            "points": round(points, 4),
            "ci95": [round(value, 4) for value in percentiles(values)],
            "p": p,
            "p_drop": p_drop,
            "error": round(error, 6),
            "test": test,
            "n": scored,
        }
    if len(first.families) == 1:
        result["avg"] = {**result[first.families[0]]}
    return result


def _floors(table: ImageSums, samples: Sequence[Sample]) -> dict[str, float]:
    """The least standard error of each family's difference, and of their mean."""
    floors = {}
    for family in table.families:
        counted = table.sums[family][:, 1] if family in EXACT else table.sums[family].any(axis=1)  # [I]
        groups = len({sample.group for sample in samples if sample.family == family})
        answers = int(counted.sum()) if family in EXACT else groups
        floors[family] = least_error(answers, int(np.count_nonzero(counted)))
    return {"avg": math.hypot(*floors.values()) / len(floors), **floors}


def _same_subset(family: str, a: np.ndarray, b: np.ndarray) -> None:
    """Both runs must have the same answers in the score: ScienceQA's image subset lacks what was not answered."""
    if others := int(np.abs(a[:, 1] - b[:, 1]).sum()):
        raise UserError(
            f"{family}: {others} questions count in one run's score only, because the other did not answer them. "
            "Finish that run before comparing it."
        )


def sign_flips(changes: np.ndarray) -> tuple[float, float]:
    """Exact test of "as often better as worse": each image's change could as well have had the other sign.

    For changes of -1, 0 and 1 this is McNemar's exact test (McNemar 1947); for sums over several questions it is
    Fisher's randomisation test with the image as the unit, which holds however alike an image's questions are.

    Args:
        changes: change of each image's sum of credits, whole numbers, [I].
    Returns:
        (probability of a sum as low as this one or lower, probability of one as high or higher).
    """
    sizes = np.abs(changes[changes != 0])
    if len(sizes) and (sizes == sizes[0]).all():
        lost, won = int((changes < 0).sum()), int((changes > 0).sum())
        return binomial_tail(won, lost + won), binomial_tail(lost, lost + won)
    chances = np.ones(1)  # of each count of units that are gained, in steps of one unit
    for size in sizes.tolist():
        grown = np.zeros(len(chances) + size)
        grown[: len(chances)] += chances / 2
        grown[size:] += chances / 2
        chances = grown
    gained = int(changes[changes > 0].sum())
    return float(chances[: gained + 1].sum()), float(chances[gained:].sum())


def binomial_tail(most: int, count: int) -> float:
    """Probability of at most `most` heads in `count` throws of a coin, from exact integers."""
    term = tail = 1
    for k in range(min(most, count)):
        term = term * (count - k) // (k + 1)
        tail += term
    return min(1.0, float(Fraction(tail, 1 << count)))


def normal_p_drop(points: float, error: float) -> float:
    """One-sided p of a drop from its standard error; 1 where the error is unknown (all resamples agree)."""
    return math.erfc(-points / error / math.sqrt(2)) / 2 if error > 0 else 1.0


def pair(a: Sequence[Sample], b: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Bring two answer lists into the same order, with the same pictures.

    A picture is called otherwise in other layouts of one benchmark, and a result file may not name it at all. It is the
    unit of resampling, so both lists take the names of the one that knows more questions to share a picture.

    Raises:
        UserError: a question is in one list only, twice in a list, or differs in prompt, truth or what it is scored
            with.
    """
    first, second = ({(s.family, s.id): s for s in samples} for samples in (a, b))
    if len(first) != len(a) or len(second) != len(b):
        raise UserError("a question was answered twice in one list, answers cannot be paired. Run the benchmark again.")
    if alone := sorted(first.keys() ^ second.keys()):
        family, name = alone[0]
        raise UserError(
            f"{len(alone)} questions were answered by one model only, first {family} {name}: other data or another "
            "number of questions. Run both on the same questions."
        )
    for key, sample in first.items():
        other = second[key]
        if any(getattr(sample, name) != getattr(other, name) for name in SAME):
            raise UserError(f"question {' '.join(key)} differs between the runs: another version of the data.")
    pictures = min(first, second, key=lambda side: len({cluster(sample) for sample in side.values()}))
    order = [(key, pictures[key].image) for key in sorted(first)]
    before, after = ([replace(side[key], image=image) for key, image in order] for side in (first, second))
    return before, after


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjust p values for testing several at once (Holm 1979)."""
    adjusted: dict[Key, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = worst
    return adjusted


def paired_seeds(pairs: Sequence[tuple[Sequence[Sample], Sequence[Sample]]]) -> dict[str, SeedDifference]:
    """Compare two ways of training, each run with the same few seeds, on the same questions.

    The hierarchical bootstrap draws seeds and images, both with replacement; the images are the same for all seeds, as
    they were in the measurement. Drawn seeds deviate from their mean too little by sqrt((S - 1) / S), which is undone.
    With few seeds that still covers too seldom, and the t interval over seeds, which knows nothing of images, may be
    narrower by chance: `widest` is the one to quote.

    Args:
        pairs: (a, b) of each seed.
    Returns:
        For "avg" and each family the mean points b - a with both intervals.
    Raises:
        UserError: no pairs, or the questions are not the same everywhere.
    """
    if not pairs:
        raise UserError("no pairs of runs to compare: at least one seed is needed.")
    tables = [(ImageSums(x), ImageSums(y)) for x, y in (pair(a, b) for a, b in pairs)]
    if any(first.images != tables[0][0].images or first.strata != tables[0][0].strata for first, _ in tables):
        raise UserError("the seeds were not asked the same questions. Evaluate all of them on the same ones.")
    seeds, images = len(tables), len(tables[0][0].images)
    weights = resampled_weights(tables[0][0].strata, SEED_RESAMPLES)  # [R, I]
    drawn = resampled_weights(((),) * seeds, len(weights), seed=1) / seeds  # [R, S]
    spread = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    resampled = [_differences(*table, weights) for table in tables]
    plain = [_differences(*table, np.ones((1, images))) for table in tables]
    result: dict[str, SeedDifference] = {}
    for name in plain[0]:
        values = np.stack([difference[name] for difference in resampled], axis=1)  # [R, S]
        mean = values.mean(axis=1)  # [R]
        total = mean + spread * ((values * drawn).sum(axis=1) - mean)  # [R]
        each = [float(difference[name][0]) for difference in plain]
        result[name] = {
            "points": round(float(np.mean(each)), 4),
            "ci95": [round(value, 4) for value in percentiles(total)],
            "p": bootstrap_p(total),
            "t_ci95": t_interval(each),
            "seeds": [round(value, 4) for value in each],
        }
    return result


def widest(found: Mapping[str, Any] | SeedDifference) -> list[float]:
    """The wider of a difference's two intervals."""
    both = [found["ci95"], *([found["t_ci95"]] if found["t_ci95"] else [])]
    return max(both, key=lambda ends: ends[1] - ends[0])


def t_interval(values: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean of a few independent values (Student 1908); None for fewer than two."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = t_quantile(len(values) - 1) * error
    return [round(mean - half, 4), round(mean + half, 4)]


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution, by integrating its density over tan(angle)."""
    # With t = sqrt(v) tan(x) the density becomes proportional to cos(x) ** (v - 1) on (-pi/2, pi/2).
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    steps = (density[1:] + density[:-1]) / 2
    share = np.concatenate([[0.0], np.cumsum(steps)]) / steps.sum()
    angle = float(np.interp(LEVEL, share, angles))
    return math.sqrt(freedom) * math.tan(angle)


def _differences(a: ImageSums, b: ImageSums, weights: np.ndarray) -> dict[str, np.ndarray]:
    before, after = a.values(weights), b.values(weights)
    return {name: after[name] - before[name] for name in before}
