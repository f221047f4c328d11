"""MME: yes/no questions in pairs about one image.

Rules: MME's eval_tool/calculation.py. The answer in lower case is "yes" or "no" if it is that word, else by what its
first four characters contain, "yes" before "no", else "other", which is wrong. Per category acc = right answers and
acc+ = images with both answers right, in percent; the category's score is acc + acc+ (at most 200), perception is the
sum over its ten categories (at most 2000), cognition over its four (800). LLaVA writes the tool's files with
convert_answer_to_mme.py, which leaves out answers whose question the ground truth lacks. lmms-eval differs: it strips
spaces and full stops first and reads a lone "y" or "n". For averages over families the score here is the mean over
categories of (acc + acc+) / 2.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from device_bench.tasks.base import Sample, TaskScore, Truth, by_group, mean_present, ratio, task_score

VERSION = "mme-1"
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
OTHER = "other"
CHANCE = 37.5  # two independent coin flips: acc 50, acc+ 25


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """ "yes", "no" or "other"."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), OTHER)


def correct(parsed: str, truth: Truth) -> float:
    """1 if the parsed word is the truth, whatever its case."""
    return float(isinstance(truth, str) and parsed == truth.lower())


def categories(samples: Sequence[Sample]) -> list[str]:
    """The categories asked, sorted."""
    return sorted({sample.category for sample in samples})


def counts(samples: Sequence[Sample]) -> np.ndarray:
    """[right, asked, pairs right, pairs] for each category, [N, 4 * C]; a pair is counted with its first answer."""
    column = {category: index for index, category in enumerate(categories(samples))}
    pair_right = {group: all(s.correct == 1 for s in members) for group, members in by_group(samples).items()}
    table = np.zeros((len(samples), len(column), 4))
    for row, sample in enumerate(samples):
        right = pair_right.pop(sample.group, None)
        table[row, column[sample.category]] = (sample.correct, 1, bool(right), right is not None)
    return table.reshape(len(samples), -1)  # [N, 4 * C]


def value(sums: np.ndarray) -> np.ndarray:
    """Mean over categories of (acc + acc+) / 2, percent: [..., 4 * C] -> [...]."""
    table = sums.reshape(*sums.shape[:-1], -1, 4)  # [..., C, 4]
    acc, acc_plus = ratio(table[..., 0], table[..., 1]), ratio(table[..., 2], table[..., 3])  # [..., C]
    return 50 * mean_present(acc + acc_plus, table[..., 1])


def details(samples: Sequence[Sample]) -> dict[str, Any]:
    """The official numbers: acc, acc+ and their sum per category, and the totals people publish."""
    table = counts(samples).sum(axis=0).reshape(-1, 4)  # [C, 4]
    acc, acc_plus = 100 * ratio(table[:, 0], table[:, 1]), 100 * ratio(table[:, 2], table[:, 3])
    names, sums = categories(samples), [float(total) for total in acc + acc_plus]
    return {
        "perception": round(sum(sums[i] for i, name in enumerate(names) if name not in COGNITION), 4),
        "cognition": round(sum(sums[i] for i, name in enumerate(names) if name in COGNITION), 4),
        "other": sum(sample.parsed == OTHER for sample in samples),
        "categories": {
            name: {"acc": round(float(acc[i]), 4), "acc_plus": round(float(acc_plus[i]), 4), "score": round(sums[i], 4)}
            for i, name in enumerate(names)
        },
    }


def score(samples: Sequence[Sample]) -> TaskScore:
    """Mean over categories of (acc + acc+) / 2 in percent; details: the official sums."""
    return task_score(samples, VERSION, counts, value, CHANCE, details(samples))
