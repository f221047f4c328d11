"""MMBench: multiple choice under every circular rotation of the options.

Rules: MMBench's circular evaluation as in VLMEvalKit (vlmeval/dataset/utils/multiple_choice.py): a question is right
only if each of its rotations is; without a judge model ("exact_matching") an answer is read by can_infer of
vlmeval/utils/matching_util.py: first the one option letter among the last four words (punctuation taken as spaces),
then "answer is X", then the one option whose text occurs in an answer not longer than twice all options together.
"Vanilla" is every rotation on its own. LLaVA and MobileVLM V2 publish the evaluation server's circular score, which
asks a judge model where this reading fails.
"""

import re
from collections.abc import Sequence

import numpy as np

from device_bench.tasks.base import (
    Sample,
    TaskScore,
    Truth,
    accuracy,
    by_group,
    credit_by,
    percent,
    task_score,
)

VERSION = "mmbench-1"
LETTERS = "ABCD"
FAILED = "failed"
REFUSED = "refused"
value = accuracy
_PUNCTUATION = str.maketrans({mark: " " for mark in ".()[],:;!*#{}"})
_SENTENCE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS = 4


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """The letter of the option meant, "refused" for the letter Z, or "failed"."""
    letters = LETTERS[: len(options)] if options else LETTERS
    return _letter(answer, letters) or _option_text(answer, letters, options) or FAILED


def _letter(answer: str, letters: str) -> str:
    words = answer.translate(_PUNCTUATION).split()
    present = [letter for letter in letters if letter in words]
    if len(present) == 1 and words.index(present[0]) >= len(words) - _LAST_WORDS:
        return present[0]
    if not present and "Z" in words:
        return REFUSED
    found = _SENTENCE.search(answer)
    return found[1].upper() if found and found[1].upper() in letters else ""


def _option_text(answer: str, letters: str, options: Sequence[str]) -> str:
    if len(answer) > 2 * sum(len(option) for option in options):
        return ""
    inside = [letter for letter, option in zip(letters, options, strict=False) if option.lower() in answer.lower()]
    return inside[0] if len(inside) == 1 else ""


def correct(parsed: str, truth: Truth) -> float:
    """1 if the parsed letter is the right one."""
    return float(parsed == truth)


def counts(samples: Sequence[Sample]) -> np.ndarray:
    """[questions right in all rotations, questions], [N, 2]; a question is counted with its first rotation."""
    right = {group: all(s.correct == 1 for s in members) for group, members in by_group(samples).items()}
    table = np.zeros((len(samples), 2))
    for row, sample in enumerate(samples):
        if sample.group in right:
            table[row] = (right.pop(sample.group), 1)
    return table


def chance(samples: Sequence[Sample]) -> float:
    """Percent of questions whose n rotations a guesser gets all right: the mean of n ** -n."""
    sizes = [(len(members[0].options), len(members)) for members in by_group(samples).values()]
    return percent(options**-rotations if options else 0.0 for options, rotations in sizes)


def score(samples: Sequence[Sample]) -> TaskScore:
    """Circular accuracy in percent; details: vanilla accuracy, circular accuracy per kind."""
    groups = by_group(samples)
    details = {
        "questions": len(groups),
        "vanilla": round(percent(sample.correct for sample in samples), 4),
        "vanilla_kinds": credit_by(samples, lambda sample: sample.kind),
        "failed": sum(sample.parsed == FAILED for sample in samples),
    }
    return task_score(samples, VERSION, counts, value, chance(samples), details)
