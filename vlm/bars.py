"""What an artifact must hold to count as the trained model, by its precision: one table for all rooms."""

import re
from typing import Literal

# Largest difference of a pixel value between vlm.preprocess and transformers' processor.
PIXEL_BAR = 1e-5
# Share of the probes whose greedy answer is the reference's, for float weights.
TOKEN_BAR = 0.99
# Lowest cosine by precision where weights are floats; all other precisions round weights to integers.
FLOAT_BARS = {"fp32": 0.9999, "fp16": 0.999, "f16": 0.999}
QUANTIZED_BAR = 0.998
# Points of accuracy an artifact may lose against the torch student: 8 bits or wider, and 4 bits.
WIDE_BAR, FOUR_BIT_BAR = -0.5, -1.0
# Norm of the rounding error of a matrix over the matrix's norm: 4 bits in blocks of 32 give about 0.1, 5 and 6 bits
# 0.05, 8 bits 0.01.
FLOAT_ROUNDING, WIDE_ROUNDING, FIVE_BIT_ROUNDING, FOUR_BIT_ROUNDING = 0.001, 0.03, 0.1, 0.2
_FOUR_BIT, _FIVE_BIT = re.compile(r"int4|q4|4w|pal4"), re.compile(r"q[56]")


def is_float(precision: str) -> bool:
    """Whether a precision's weights are floats, so that the artifact is held against the checkpoint itself."""
    return precision in FLOAT_BARS


def is_four_bit(precision: str) -> bool:
    """Whether a precision's name says that the decoder's weights have four bits."""
    return _FOUR_BIT.search(precision) is not None


def cosine_bar(precision: str) -> float:
    """Lowest cosine of patch features, vision tokens and logits."""
    return FLOAT_BARS.get(precision, QUANTIZED_BAR)


def rounding_bar(precision: str) -> float:
    """Largest relative error of a matrix that its storage explains."""
    if is_float(precision):
        return FLOAT_ROUNDING
    if _FIVE_BIT.search(precision):
        return FIVE_BIT_ROUNDING
    return FOUR_BIT_ROUNDING if is_four_bit(precision) else WIDE_ROUNDING


def accuracy_bar(precision: str) -> float:
    """Points of accuracy the artifact may lose against the torch student, as a negative number."""
    return FOUR_BIT_BAR if is_four_bit(precision) else WIDE_BAR


def accuracy_verdict(points: float, ci95: list[float], precision: str) -> Literal["pass", "fail", "unknown"]:
    """Judge a paired difference to the torch student; unknown where it is under its bar within the noise.

    Args:
        points: artifact minus student, in points.
        ci95: the paired 95 % interval, [low, high].
        precision: the artifact's.
    """
    bar = accuracy_bar(precision)
    return "pass" if points >= bar else "unknown" if ci95[1] >= bar else "fail"
