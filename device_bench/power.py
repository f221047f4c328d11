"""How small a drop a comparison can see, and how many questions it takes to see one.

The gate's test is one-sided at ALPHA: a drop is seen when it exceeds z(ALPHA) standard errors of the paired
difference. For answers right or wrong, of which a share d changes sides between two equal models, the variance of the
difference of n of them is (d - drop^2) / n (Miettinen 1968, Connor 1987).
"""

import math
from statistics import NormalDist

ALPHA = 0.05
POWER = 0.95
DISAGREEMENTS = (0.02, 0.05, 0.08, 0.10, 0.15, 0.20, 0.30)


def deviations(alpha: float = ALPHA, power: float = POWER) -> float:
    """Standard errors that a drop must have to be seen with this power."""
    return NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(power)


def standard_error(disagreement: float, drop: float, n: int) -> float:
    """Standard error in points of the paired difference of n answers, of which a share changes sides."""
    return 100 * math.sqrt((disagreement - (drop / 100) ** 2) / n)


def questions_needed(drop: float, disagreement: float, alpha: float = ALPHA, power: float = POWER) -> int:
    """Independent questions that it takes to see a drop.

    Args:
        drop: points of percent, above 0.
        disagreement: share of the questions that one model has right and the other wrong, at least the drop's.
        alpha: chance of an alarm where nothing got worse.
        power: chance of seeing the drop.
    """
    share = drop / 100
    return math.ceil(deviations(alpha, power) ** 2 * max(disagreement - share**2, 0.0) / share**2)


def smallest_drop(error: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """Drop in points that is seen with this power, from the standard error of the difference in points."""
    return deviations(alpha, power) * error


def chance_to_see(drop: float, error: float, alpha: float, allowed: float) -> float:
    """Chance that the gate calls a drop (0: none): that it is measured beyond the allowance and beyond the noise.

    Args:
        drop: points of percent.
        error: standard error of the difference, in points.
        alpha: of the one-sided test.
        allowed: points that may be lost.
    """
    return 1 - NormalDist(drop, error).cdf(max(allowed, NormalDist().inv_cdf(1 - alpha) * error))


def least_error(n: int, images: int) -> float:
    """The standard error in points below which no measured one is believed.

    As if one image more had changed sides: that none did of a few says little. The smallest drop seen of n equal
    answers is then 3.3 in n, about the rule of three (Hanley and Lippman-Hand 1983).
    """
    return standard_error(1 / images, 0.0, n) if images else 100.0


def needed_from(error: float, n: int, drop: float, alpha: float = ALPHA, power: float = POWER) -> int:
    """Questions that it takes to see a drop, from a measured comparison of n: errors shrink with the root of n.

    Never fewer than the least error of independent questions takes, which shrinks with n itself.
    """
    from_error = n * (smallest_drop(error, alpha, power) / drop) ** 2
    return math.ceil(max(from_error, smallest_drop(n * least_error(n, n), alpha, power) / drop))
