"""Bootstrap over images: answers about one image are not independent, so images are drawn, not answers. NumPy only."""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np

RESAMPLES = 1000
SEED = 20_240
LEVEL = 0.95
Z95 = 1.959964


def image_sums(images: Sequence[str], counts: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Sum the rows of each image.

    Args:
        images: the image of each row, [N].
        counts: numbers of each answer, [N, K].
    Returns:
        The images in alphabetical order, so that the order of the answers cannot matter, and their sums [I, K].
    """
    names, index = np.unique(np.asarray(images, dtype=object).astype(str), return_inverse=True)
    sums = np.zeros((len(names), counts.shape[1]))
    np.add.at(sums, index, counts)
    return names.tolist(), sums


@lru_cache(maxsize=4)
def resampled_weights(strata: tuple[Hashable, ...], resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """How often each image is drawn in each resample, with replacement, within its stratum; kept for the next caller.

    Args:
        strata: of each image; images of different benchmarks are different strata, so that no resample lacks one.
        resamples: R.
        seed: the same seed gives the same draws.
    Returns:
        Counts [R, I], read-only; each row sums to I.
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((resamples, len(strata)))
    members: dict[Hashable, list[int]] = {}
    for position, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(position)
    for positions in members.values():
        size = len(positions)
        drawn = rng.integers(0, size, (resamples, size)) + size * np.arange(resamples)[:, None]  # [R, S]
        weights[:, positions] = np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size)
    weights.flags.writeable = False
    return weights


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The central 95 % of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval(values: np.ndarray, score: float, images: int) -> tuple[float, float]:
    """95 % interval of a score in percent.

    The percentiles of the resampled values; where all resamples agree (0 or 100 % right, or one image) the bootstrap
    knows no spread, so Wilson's interval over images stands in.

    Args:
        values: resampled scores, [R].
        score: the score itself, percent.
        images: number of images.
    """
    low, high = percentiles(values)
    if high - low > 1e-9:
        return low, high
    low, high = wilson(score / 100 * images, images)
    return 100 * low, 100 * high


def wilson(right: float, asked: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), as fractions; (0, 1) when nothing was asked."""
    if asked <= 0:
        return 0.0, 1.0
    share = min(max(right / asked, 0.0), 1.0)
    scale = 1 + z * z / asked
    centre = (share + z * z / (2 * asked)) / scale
    half = z / scale * (share * (1 - share) / asked + z * z / (4 * asked * asked)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_p(differences: np.ndarray) -> float:
    """Two-sided p of "no difference": twice the smaller tail of the resampled differences, never below 2 / (R + 1)."""
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(differences) + 1))
