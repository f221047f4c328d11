"""Put questions to a model, grade its answers by the official rules, and score them with intervals."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import numpy as np

from device_bench.pictures import load_picture
from device_bench.resampling import image_sums, interval, resampled_weights
from device_bench.tasks.base import UNKNOWN, BenchQuestion, Sample, Task, TaskScore, cluster
from vlm.data.records import SCENES
from vlm.data.scenes.question import FAMILIES
from vlm.errors import UserError
from vlm.folders import write_atomic
from vlm.registry import load, names
from vlm.runtimes.base import Runtime, VisionOutput

TASKS = "device_bench.tasks"
UNKNOWN_LINE = " (not all of a known edition: compare it with no published number)"


class Average(TypedDict):
    """Mean of the families' scores in percent, with the interval of resampling images for all families at once."""

    score: float
    n: int
    ci95: list[float]


class Accuracy(TypedDict):
    """What report.json holds about one model's accuracy."""

    avg: Average
    tasks: dict[str, TaskScore]


@cache
def task(family: str) -> Task:
    """The module that grades a family.

    Raises:
        UserError: there is none of that name.
    """
    module: Task = load(TASKS, family)
    return module


@cache
def families() -> tuple[str, ...]:
    """Every family whose answers can be graded, in the order in which scores are listed."""
    found = [name for name in names(TASKS) if hasattr(load(TASKS, name), "counts")]
    return (*FAMILIES, *(name for name in found if name not in FAMILIES))


def questions(tasks: Sequence[str], scenes: int, data: Path | None = None) -> list[BenchQuestion]:
    """Everything that some benchmarks ask.

    Args:
        tasks: modules of device_bench.tasks: "scenes", which draws its questions, or benchmarks that lie in `data`.
        scenes: how many test images of a benchmark that draws its own.
        data: folder with the questions of real benchmarks (docs/benchmarks.md).
    Raises:
        UserError: there is no such benchmark, or its questions are not there.
    """
    asked: list[BenchQuestion] = []
    for name in tasks:
        if data is not None and name in FAMILIES:
            asked += task(name).load(data)
        else:
            asked += asking(name).questions(scenes)
    return asked


def versions(asked: Sequence[BenchQuestion]) -> dict[str, dict[str, Any]]:
    """Which edition of each real benchmark some questions are; the built-in scenes have none."""
    real = [question for question in asked if not question.image.startswith(SCENES)]
    found = {name: [question for question in real if question.family == name] for name in FAMILIES}
    return {name: task(name).version(members) for name, members in found.items() if members}


def publish(accuracy: Accuracy, editions: dict[str, dict[str, Any]]) -> Accuracy:
    """Add to the details of real benchmarks which data it was ("data") and the score as people publish it ("line").

    The line of a part of a benchmark, or of an edition that nobody published, says so.
    """
    for name, edition in editions.items():
        found = accuracy["tasks"][name]
        known = edition["edition"].values() if isinstance(edition["edition"], dict) else [edition["edition"]]
        asked = max(found["n"], found["details"].get("questions", 0))  # ScienceQA's n is its image subset
        mark = asked < edition["questions"] or any(part.startswith(UNKNOWN) for part in known)
        found["details"] |= {"data": edition, "line": task(name).line(found) + UNKNOWN_LINE * mark}
    return accuracy


def asking(name: str) -> ModuleType:
    """The module of a benchmark that asks questions.

    Raises:
        UserError: there is no such benchmark, or it only grades answers and has no questions here.
    """
    module = load(TASKS, name)
    if hasattr(module, "questions"):
        return module
    known = [other for other in names(TASKS) if hasattr(load(TASKS, other), "questions")]
    raise UserError(
        f"task {name!r} grades answers but brings no questions; {', '.join(known)} does. Its questions lie in a "
        "folder: give it with --data (docs/benchmarks.md)."
    )


def grade(question: BenchQuestion, answer: str, **measured: Any) -> Sample:
    """Read an answer and give it credit by its family's rules; `measured` are the other fields of a sample."""
    known = {field.name: getattr(question, field.name) for field in fields(BenchQuestion)}
    return regrade(Sample(**known, answer=answer, **measured))


def regrade(sample: Sample) -> Sample:
    """Read a sample's answer again."""
    rules = task(sample.family)
    parsed = sample.answer if sample.as_given else rules.parse(sample.answer, sample.options)
    return replace(sample, parsed=parsed, correct=rules.correct(parsed, sample.truth))


def evaluate(
    runtime: Runtime,
    questions: Sequence[BenchQuestion],
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Ask every question greedily; each image is encoded once for its consecutive questions.

    A question whose prompt does not fit into the model's context is not asked: its answer is empty, and `problem` says
    why; scores count such samples as "unasked".

    Args:
        runtime: the loaded model.
        questions: in the order to ask.
        max_new_tokens: per answer.
        on_progress: called with (answers so far, all) after each answer.
    Returns:
        One sample per question in the same order; `ms` is prompt to end of answer, without the image.
    """
    samples: list[Sample] = []
    image, vision = "", None
    for question in questions:
        start = time.perf_counter()
        if question.image != image:
            image, vision = question.image, _encode(runtime, question.image)
        vision_ms = (time.perf_counter() - start) * 1e3
        samples.append(_ask(runtime, question, vision, max_new_tokens, vision_ms))
        if on_progress:
            on_progress(len(samples), len(questions))
    return samples


def evaluate_batch(runtime: Runtime, questions: Sequence[BenchQuestion], max_new_tokens: int) -> list[Sample]:
    """Ask questions together; each image is encoded once.

    Args:
        runtime: the loaded model; only the torch engine works on several at once.
        questions: one batch.
        max_new_tokens: per answer.
    Returns:
        One sample per question in the same order; `ms` is the batch's time divided by its questions.
    """
    visions: dict[str, VisionOutput | None] = {}
    encoded: dict[str, float] = {}
    for image in dict.fromkeys(question.image for question in questions):
        start = time.perf_counter()
        visions[image] = _encode(runtime, image)
        encoded[image] = (time.perf_counter() - start) * 1e3 if image else 0.0
    prompts = [runtime.prompt(question.prompt, visions[question.image] is not None) for question in questions]
    fitting = [n for n, prompt in enumerate(prompts) if len(prompt) < runtime.facts.context_length]
    start = time.perf_counter()
    batch = [prompts[n] for n in fitting], [visions[questions[n].image] for n in fitting]
    answers = dict(zip(fitting, runtime.generate_batch(*batch, max_new_tokens) if fitting else [], strict=True))
    ms = (time.perf_counter() - start) * 1e3 / max(1, len(fitting))
    samples = []
    for n, question in enumerate(questions):
        if n not in answers:
            samples.append(grade(question, "", problem=_too_long(len(prompts[n]), runtime)))
            continue
        text, vision_ms = runtime.tokenizer.decode(answers[n]), encoded.pop(question.image, 0.0)
        samples.append(grade(question, text, ms=ms, vision_ms=vision_ms, tokens=len(answers[n])))
    return samples


def _too_long(length: int, runtime: Runtime) -> str:
    return f"the prompt has {length} tokens, the context holds {runtime.facts.context_length}"


def _ask(
    runtime: Runtime, question: BenchQuestion, vision: VisionOutput | None, max_new_tokens: int, vision_ms: float
) -> Sample:
    length = len(runtime.prompt(question.prompt, vision is not None))
    if length + 1 > runtime.facts.context_length:
        return grade(question, "", problem=_too_long(length, runtime))
    start = time.perf_counter()
    answer = runtime.answer(None, question.prompt, max_new_tokens, vision=vision)
    ms = (time.perf_counter() - start) * 1e3
    return grade(question, answer.text, ms=ms, vision_ms=vision_ms, tokens=len(answer.tokens))


def _encode(runtime: Runtime, image: str) -> VisionOutput | None:
    return runtime.encode_image(runtime.pixels(load_picture(image))) if image else None


class ImageSums:
    """Samples of several families as sums over images, ready to be resampled together.

    Images are drawn within strata of the same set of families: benchmarks with their own images keep their sizes, and
    families that share images, as the built-in scenes do, are drawn together.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        asked = {sample.family for sample in samples}
        self.families = [family for family in families() if family in asked]
        self.images = sorted({cluster(sample) for sample in samples})
        place = {image: index for index, image in enumerate(self.images)}
        strata: list[list[str]] = [[] for _ in self.images]
        self.sums: dict[str, np.ndarray] = {}
        for family in self.families:
            members = [sample for sample in samples if sample.family == family]
            names, sums = image_sums([cluster(sample) for sample in members], task(family).counts(members))
            rows = [place[name] for name in names]
            self.sums[family] = np.zeros((len(self.images), sums.shape[1]))  # [I, K]
            self.sums[family][rows] = sums
            for row in rows:
                strata[row].append(family)
        self.strata = tuple(tuple(stratum) for stratum in strata)

    def values(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Scores in percent under image weights [R, I]: one array [R] per family, and their mean as "avg"."""
        scores = {family: task(family).value(weights @ self.sums[family]) for family in self.families}
        return {"avg": np.mean([scores[family] for family in self.families], axis=0), **scores}


def score(samples: Sequence[Sample]) -> Accuracy:
    """Score each family by its official rule, and average the families.

    Raises:
        UserError: there are no samples, or one has an unknown family.
    """
    for family in {sample.family for sample in samples} - set(families()):
        task(family)
        raise UserError(f"{family!r} is a set of questions, not a family of them. Families: {', '.join(families())}.")
    if not samples:
        raise UserError("no answers to score: the file or the selection of tasks is empty.")
    table = ImageSums(samples)
    tasks = {f: _score(f, [sample for sample in samples if sample.family == f]) for f in table.families}
    average = float(table.values(np.ones((1, len(table.images))))["avg"][0])
    resampled = table.values(resampled_weights(table.strata))["avg"]
    low, high = interval(resampled, average, len(table.images))
    return {
        "avg": {"score": round(average, 4), "n": len(samples), "ci95": [round(low, 4), round(high, 4)]},
        "tasks": tasks,
    }


def _score(family: str, samples: Sequence[Sample]) -> TaskScore:
    found = task(family).score(samples)
    if unasked := sum(bool(sample.problem) for sample in samples):
        found["details"]["unasked"] = unasked
    return found


def save_answers(samples: Iterable[Sample], path: Path) -> None:
    """Write one JSON line per sample."""
    write_atomic(path, "".join(json.dumps(vars(sample), ensure_ascii=False) + "\n" for sample in samples))


def load_answers(path: Path) -> list[Sample]:
    """Read what `save_answers` wrote.

    Raises:
        UserError: the file is missing, or a line is no sample; names the line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such answers file. Run the benchmark again: pocketvlm bench.")
    # Not splitlines: an answer may hold a line separator that is none of JSON lines.
    lines = path.read_text().split("\n")
    return [_sample(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _sample(path: Path, number: int, line: str) -> Sample:
    try:
        row = json.loads(line)
        truth = row["truth"]
        row["truth"] = truth if isinstance(truth, str) else tuple(truth)
        return Sample(**{**row, "options": tuple(row["options"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}:{number}: not one of our answers ({error}). Run the benchmark again.") from error
