"""POPE: is this object in the image, in three settings.

Rules: POPE's evaluate.py and LLaVA's eval_pope.py, which read alike: of the text before the first full stop, without
commas and cut at spaces, the words "No", "not" and "no" mean no; everything else, an empty answer too, means yes.
Precision, recall and F1 are of "yes". The published number is the mean of the three settings' F1 (LLaVA-1.5,
MobileVLM V2). VLMEvalKit differs: it asks for the word yes or no anywhere in lower case, counts what has neither as
no, and publishes the F1 over all answers together.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from device_bench.tasks.base import Sample, TaskScore, Truth, mean_present, ratio, task_score

VERSION = "pope-1"
NO_WORDS = {"No", "not", "no"}


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """ "yes" or "no"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if NO_WORDS.intersection(words) else "yes"


def label(truth: Truth) -> str:
    """ "no" or, for every other label, "yes"."""
    return "no" if isinstance(truth, str) and truth.lower() == "no" else "yes"


def correct(parsed: str, truth: Truth) -> float:
    """1 if the parsed word is the label."""
    return float(parsed == label(truth))


def settings(samples: Sequence[Sample]) -> list[str]:
    """The settings asked, sorted."""
    return sorted({sample.category for sample in samples})


def counts(samples: Sequence[Sample]) -> np.ndarray:
    """[said yes and is, said yes, is, right, asked] for each setting, [N, 5 * S]."""
    column = {setting: index for index, setting in enumerate(settings(samples))}
    table = np.zeros((len(samples), len(column), 5))
    for row, sample in enumerate(samples):
        said, there = sample.parsed == "yes", label(sample.truth) == "yes"
        table[row, column[sample.category]] = (said and there, said, there, said == there, 1)
    return table.reshape(len(samples), -1)  # [N, 5 * S]


def value(sums: np.ndarray) -> np.ndarray:
    """Mean over settings of F1 = 2 TP / (said yes + is), percent: [..., 5 * S] -> [...]."""
    table = sums.reshape(*sums.shape[:-1], -1, 5)  # [..., S, 5]
    return 100 * mean_present(ratio(2 * table[..., 0], table[..., 1] + table[..., 2]), table[..., 4])


def chance(samples: Sequence[Sample]) -> float:
    """Mean F1 of always saying yes."""
    table = counts(samples).sum(axis=0).reshape(-1, 5)  # [S, 5]
    return 100 * float(mean_present(ratio(2 * table[:, 2], table[:, 4] + table[:, 2]), table[:, 4]))


def details(samples: Sequence[Sample]) -> dict[str, Any]:
    """Precision, recall, F1, accuracy and share of yes per setting, percent."""
    table = counts(samples).sum(axis=0).reshape(-1, 5)  # [S, 5]
    columns = {
        "precision": ratio(table[:, 0], table[:, 1]),
        "recall": ratio(table[:, 0], table[:, 2]),
        "f1": ratio(2 * table[:, 0], table[:, 1] + table[:, 2]),
        "accuracy": ratio(table[:, 3], table[:, 4]),
        "yes_ratio": ratio(table[:, 1], table[:, 4]),
    }
    rows = {
        setting: {**{name: round(100 * float(column[i]), 4) for name, column in columns.items()}, "n": int(table[i, 4])}
        for i, setting in enumerate(settings(samples))
    }
    return {"settings": rows, "accuracy": round(100 * float(table[:, 3].sum() / table[:, 4].sum()), 4)}


def score(samples: Sequence[Sample]) -> TaskScore:
    """Mean F1 over the settings in percent; details per setting."""
    return task_score(samples, VERSION, counts, value, chance(samples), details(samples))
