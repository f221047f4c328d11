"""What a benchmark is made of: questions, graded answers, and a score that is a function of sums over images.

Every official score used here can be computed from sums of a few numbers per answer: [right, asked] for an accuracy,
[true positives, predicted yes, labelled yes] for an F1. Each task therefore says its numbers (`counts`, [N, K]) and
how their sums become percent (`value`, [..., K] -> [...]). The official score is the value of the plain sums; an
interval is the values of sums over resampled images.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

from device_bench.resampling import image_sums, interval, resampled_weights
from device_bench.rows import Row
from vlm.errors import UserError

Truth = str | tuple[str, ...]
Editions = dict[tuple[int, ...], str]  # counts of questions -> what people call the edition
UNKNOWN = "unknown"  # an edition's name, or its start


@dataclass(frozen=True)
class BenchQuestion:
    """One question to put to a model.

    Attributes:
        id: unique within its family.
        image: where the picture is ("scenes:950001", a file), "" for a question without one; answers about one image
            are not independent, so it is also the unit of resampling.
        family: the benchmark whose rules grade it.
        kind: what is asked, the unit of the most-frequent-answer baseline.
        category: MME's category, POPE's setting, else "".
        group: questions with the same group are scored together (MME's pairs, MMBench's rotations).
        prompt: the human's words, without the image's line.
        truth: the right answer; for real TextVQA the ten human answers.
        options: the texts behind the letters, in the order shown.
    """

    id: str
    image: str
    family: str
    kind: str
    category: str
    group: str
    prompt: str
    truth: Truth
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample(BenchQuestion):
    """A question with its graded answer.

    Attributes:
        answer: what the model said.
        parsed: what the official rules read in it.
        correct: credit from 0 to 1; fractions occur in TextVQA only.
        ms: milliseconds from the prompt to the end of the answer, without the image.
        vision_ms: milliseconds that its image took, on the first of the image's questions; else 0.
        tokens: length of the answer.
        problem: why the model was not asked ("the prompt has 600 tokens, the context holds 512"), else "".
        as_given: the official scorer compares the answer as its file has it, without reading it first.
    """

    answer: str = ""
    parsed: str = ""
    correct: float = 0.0
    ms: float = 0.0
    vision_ms: float = 0.0
    tokens: int = 0
    problem: str = ""
    as_given: bool = False


class TaskScore(TypedDict):
    """Score of one family in percent with its bootstrap interval; `n` counts answers."""

    score: float
    n: int
    ci95: list[float]
    chance: float
    version: str
    details: dict[str, Any]


class Task(Protocol):
    """A benchmark's module in this package."""

    VERSION: str
    TABLES: Sequence[str]

    def load(self, data: Path) -> list[BenchQuestion]:
        """Read the questions in whichever layout lies in a folder."""

    def version(self, questions: Sequence[BenchQuestion]) -> dict[str, Any]:
        """Say which edition of the benchmark some questions are."""

    def from_row(self, row: Row, image: str) -> list[BenchQuestion]:
        """Read the questions of one row of a VLMEvalKit table."""

    def answer_key(self, row: Row, place: str) -> Hashable:
        """Say which question a row of an answer file answers."""

    def question_keys(self, question: BenchQuestion) -> tuple[Hashable, ...]:
        """Say all that `answer_key` may say of its answers."""

    def line(self, score: TaskScore) -> str:
        """Put the score into the words in which people publish it."""

    def parse(self, answer: str, options: Sequence[str] = ()) -> str:
        """Read an answer as the official scorer does."""

    def correct(self, parsed: str, truth: Truth) -> float:
        """Credit of a parsed answer, 0 to 1."""

    def counts(self, samples: Sequence[Sample]) -> np.ndarray:
        """The numbers of each answer, [N, K]."""

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Percent from sums of the numbers, [..., K] -> [...]."""

    def score(self, samples: Sequence[Sample]) -> TaskScore:
        """Score, interval, chance and details."""


def task_score(
    samples: Sequence[Sample],
    version: str,
    counts: Callable[[Sequence[Sample]], np.ndarray],
    value: Callable[[np.ndarray], np.ndarray],
    chance: float,
    details: dict[str, Any],
) -> TaskScore:
    """Put a family's score together; the 95 % interval is a bootstrap over images (device_bench.resampling).

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples to score")
    _, sums = image_sums([cluster(sample) for sample in samples], counts(samples))  # [I, K]
    score = float(value(sums.sum(axis=0)))
    weights = resampled_weights(((),) * len(sums))  # [R, I]
    low, high = interval(value(weights @ sums), score, len(sums))
    return {
        "score": round(score, 4),
        "n": len(samples),
        "ci95": [round(low, 4), round(high, 4)],
        "chance": round(chance, 4),
        "version": version,
        "details": {"images": len(sums), **details},
    }


def cluster(sample: BenchQuestion) -> str:
    """The unit of resampling: the image, or the question itself where there is none."""
    return sample.image or f"no image: {sample.id}"


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=np.asarray(whole) != 0)


def mean_present(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the values whose size is not 0: [..., C] -> [...]."""
    present = np.asarray(sizes) != 0
    return ratio((values * present).sum(axis=-1), present.sum(axis=-1))


def credit_counts(samples: Sequence[Sample]) -> np.ndarray:
    """[credit, 1] of each answer, [N, 2]: the counts of a plain accuracy."""
    return np.array([(sample.correct, 1.0) for sample in samples]).reshape(-1, 2)


def accuracy(sums: np.ndarray) -> np.ndarray:
    """100 * right / asked: [..., 2] -> [...]."""
    return 100 * ratio(sums[..., 0], sums[..., 1])


def by_group(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples of each group, in the order of first appearance."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    return dict(groups)


def credit_by(samples: Sequence[Sample], key: Callable[[Sample], str]) -> dict[str, float]:
    """Mean credit in percent for each value of `key`, sorted by it."""
    groups: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        groups[key(sample)].append(sample.correct)
    return {name: round(percent(groups[name]), 4) for name in sorted(groups)}


def percent(credits: Iterable[float]) -> float:
    """100 times the mean, 0 of nothing."""
    values = list(credits)
    return 100 * sum(values) / len(values) if values else 0.0


def edition(questions: Sequence[BenchQuestion], editions: Editions, *counts: int, **more: Any) -> dict[str, Any]:
    """Which edition of a benchmark some questions are.

    Args:
        questions: all of them.
        editions: known counts and what they are called.
        counts: what tells editions apart; the number of questions if none are given.
        more: further facts.
    Returns:
        "edition", "questions", further facts, and "sha256" of ids, prompts, truths and options.
    Raises:
        UserError: there are no questions.
    """
    if not questions:
        raise UserError("the question files hold no question. Download them again.")
    lines = sorted("\t".join((q.id, q.prompt, str(q.truth), *q.options)) for q in questions)
    counts = counts or (len(questions),)
    name = editions.get(counts, f"{UNKNOWN}: {' / '.join(f'{count:,}' for count in counts)}")
    return {"edition": name, "questions": len(questions), **more, "sha256": digest(lines)}


def digest(lines: Sequence[str]) -> str:
    """First 12 digits of the SHA-256 of some lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
