"""ScienceQA: multiple choice, one letter.

Rules: LLaVA's llava/eval/eval_science_qa.py, used by MobileVLM V2 too. Read are, in this order: a bare letter A-E; a
letter followed by ". "; exactly one "The answer is X" followed by one more character. Anything else is a failed
answer and wrong, and so is a letter beyond the options. "B)", "(B)", "b", "B." and the option's text do not count;
VLMEvalKit reads most of them (can_infer, see mmbench.py). The published column (SQA-IMG) is the questions with an
image; "all" is in the details.
"""

import re
from collections.abc import Sequence

import numpy as np

from device_bench.tasks.base import Sample, TaskScore, Truth, accuracy, credit_counts, percent, task_score

VERSION = "scienceqa-1"
LETTERS = "ABCDE"
FAILED = "failed"
value = accuracy
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """The letter of the option meant, or "failed"; with options given, a letter beyond them is failed too."""
    if len(answer) == 1 and answer in LETTERS:
        letter = answer
    elif len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        letter = answer[0]
    else:
        found = _SENTENCE.findall(answer)
        letter = found[0] if len(found) == 1 else FAILED
    known = LETTERS[: len(options)] if options else LETTERS
    return letter if letter in known else FAILED


def correct(parsed: str, truth: Truth) -> float:
    """1 if the parsed letter is the right one."""
    return float(parsed == truth)


def counts(samples: Sequence[Sample]) -> np.ndarray:
    """[right, asked], [N, 2]; text-only questions count only where no question has an image."""
    scored = np.array([bool(sample.image) for sample in samples])  # [N]
    return credit_counts(samples) * (scored if scored.any() else ~scored)[:, None]


def chance(samples: Sequence[Sample]) -> float:
    """Percent right of a guess among each question's options."""
    return percent(1 / len(sample.options) if sample.options else 0.0 for sample in samples)


def score(samples: Sequence[Sample]) -> TaskScore:
    """Accuracy on the image subset in percent; details: all questions, and how many answers could not be read."""
    details = {
        "questions": len(samples),
        "all": round(percent(sample.correct for sample in samples), 4),
        "failed": sum(sample.parsed == FAILED for sample in samples),
    }
    with_image = [sample for sample in samples if sample.image] or samples
    return task_score(with_image, VERSION, counts, value, chance(with_image), details)
