"""The built-in benchmark: questions of all six families about drawn scenes, graded by the real benchmarks' rules."""

from device_bench.tasks.base import BenchQuestion
from vlm.data.records import SCENES
from vlm.data.scenes.question import Question
from vlm.data.scenes.questions import benchmark_questions
from vlm.data.scenes.scene import TEST_START, make_scene

VERSION = "scenes-1"


def questions(count: int, start: int = TEST_START) -> list[BenchQuestion]:
    """All questions about `count` scenes, scene by scene.

    Args:
        count: number of scenes.
        start: seed of the first; the held-out test scenes start at TEST_START.
    """
    return [
        _question(seed, number, question)
        for seed in range(start, start + count)
        for number, question in enumerate(benchmark_questions(make_scene(seed)))
    ]


def _question(seed: int, number: int, question: Question) -> BenchQuestion:
    # GQA's gold answers are in lower case, and its scorer lowers the model's answer only.
    truth = question.answer.lower() if question.family == "gqa" else question.answer
    return BenchQuestion(
        id=f"{seed}-{number}",
        image=f"{SCENES}{seed}",
        family=question.family,
        kind=question.kind,
        category=question.category,
        group=question.group,
        prompt=question.prompt,
        truth=truth,
        options=question.options,
    )
