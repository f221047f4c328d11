"""ScienceQA: multiple choice, one letter.

Rules: LLaVA's llava/eval/eval_science_qa.py, used by MobileVLM V2 too. Read are, in this order: a bare letter A-E; a
letter followed by ". "; exactly one "The answer is X" followed by one more character. Anything else is a failed
answer and wrong, and so is a letter beyond the options. "B)", "(B)", "b", "B." and the option's text do not count;
VLMEvalKit reads most of them (can_infer, see mmbench.py). The published column (SQA-IMG) is the questions with an
image; "all" is in the details.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from device_bench.pictures import table_rows
from device_bench.rows import Row, find, id_of, need, read_json, text_of
from device_bench.tasks.base import (
    BenchQuestion,
    Editions,
    Sample,
    TaskScore,
    Truth,
    accuracy,
    credit_counts,
    edition,
    percent,
    task_score,
)
from vlm.data.scenes.question import CHOOSE

VERSION = "scienceqa-1"
LETTERS = "ABCDE"
FAILED = "failed"
UNANSWERED = "unanswered"  # the kind of such a question
LLAVA = ("llava_test_CQM-A.json",)
PROBLEMS, SPLITS, SPLIT = ("problems.json",), ("pid_splits.json",), "test"
TABLES = ("ScienceQA_TEST.tsv",)
EDITIONS: Editions = {(4241, 2017): "test split", (2017, 2017): "test split, questions with an image"}
value = accuracy
_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_OPTION = re.compile(r"^([A-E])\. (.*?)(?=\n[A-E]\. |\Z)", re.MULTILINE | re.DOTALL)  # may have several lines


def load(data: Path) -> list[BenchQuestion]:
    """Read LLaVA's llava_test_CQM-A.json, ScienceQA's problems.json with pid_splits.json, or VLMEvalKit's table.

    Pictures, below the questions: images/test/<id>/image.png, test/<id>/image.png, images/<id>.jpg, and the like.
    """
    if path := find(data, LLAVA):
        return [_from_llava(row, path.parent) for row in read_json(path)]
    if path := find(data, PROBLEMS):
        ids = read_json(need(data, SPLITS, "ScienceQA's splits"))[SPLIT]
        problems = read_json(path)
        return [_from_problem(str(name), problems[str(name)], path.parent) for name in ids]
    table = need(data, (*LLAVA, *PROBLEMS, *TABLES), "ScienceQA's questions")
    return [question for row, image in table_rows(table) for question in from_row(row, image)]


def version(questions: Sequence[BenchQuestion]) -> dict[str, Any]:
    """Name the edition by its questions and how many of them have an image."""
    with_image = sum(bool(question.image) for question in questions)
    return edition(questions, EDITIONS, len(questions), with_image, with_image=with_image)


def _from_llava(row: Row, folder: Path) -> BenchQuestion:
    name, image = str(row["id"]), row.get("image", "")
    prompt = row["conversations"][0]["value"].replace("<image>", "").strip()
    found = _OPTION.findall(prompt)  # a context above the options may have lettered lines of its own
    last = max((index for index, (letter, _) in enumerate(found) if letter == "A"), default=0)
    return _question(
        name, prompt, [text for _, text in found[last:]], row["conversations"][1]["value"], folder, str(image)
    )


def _from_problem(name: str, row: Row, folder: Path) -> BenchQuestion:
    image = f"{name}/{row['image']}" if row.get("image") else ""
    prompt = _prompt(row, row["question"], row["choices"])
    return _question(name, prompt, row["choices"], LETTERS[row["answer"]], folder, image)


def from_row(row: Row, image: str) -> list[BenchQuestion]:
    """Read index, question, hint, A to E, answer."""
    name, place = str(row["index"]), f"ScienceQA's question {row['index']}"
    options = [str(row[letter]) for letter in LETTERS if letter in row]
    prompt = _prompt(row, text_of(row, ("question",), place), options)
    truth = text_of(row, ("answer",), place)
    asked = f"{prompt}\n{CHOOSE}"
    return [BenchQuestion(name, image or name, "scienceqa", "image", "", name, asked, truth, tuple(options))]


def _prompt(row: Row, question: str, options: Sequence[str]) -> str:
    """The prompt of LLaVA's test file, whose converter also makes one space of two."""
    context = [f"Context: {row['hint']}"] if row.get("hint") else []
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*context, question, *lettered]).replace("  ", " ").strip()


def _question(name: str, prompt: str, options: Sequence[str], truth: str, folder: Path, image: str) -> BenchQuestion:
    kind, asked = ("image" if image else "text"), f"{prompt}\n{CHOOSE}"
    found = _picture(folder, name, image) if image else ""
    return BenchQuestion(name, found, "scienceqa", kind, "", name, asked, truth, tuple(options))


def _picture(folder: Path, name: str, image: str) -> str:
    """Each picture has a folder of its own, so each is looked for."""
    places = [*(folder / part / image for part in ("images/test", "test", "images")), folder / "images" / f"{name}.jpg"]
    return str(next((place for place in places if place.is_file()), places[0]))


def answer_key(row: Row, place: str) -> Hashable:
    """Take the id."""
    return id_of(row, ("question_id", "index"), place)


def question_keys(question: BenchQuestion) -> tuple[Hashable, ...]:
    """Take the id."""
    return (question.id,)


def unanswered(question: BenchQuestion) -> BenchQuestion:
    """Take a question without an answer as eval_science_qa.py does, which counts it as wrong.

    It knows only from the answer's prompt that a question has an image, so this one is not in the image subset.
    """
    return replace(question, kind=UNANSWERED)


def in_subset(sample: Sample) -> bool:
    """Whether a sample is one of the image subset."""
    return bool(sample.image) and sample.kind != UNANSWERED


def line(score: TaskScore) -> str:
    """What eval_science_qa.py prints; papers quote the first as SQA-I. Without an image question it is 0 / 0 there."""
    subset = f"IMG-Accuracy {score['score']:.2f}, " if score["details"]["image_subset"] else ""
    return f"ScienceQA {subset}Accuracy {score['details']['all']:.2f}"


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
    """[right, asked], [N, 2]; text-only questions count only where the image subset is empty."""
    scored = np.array([in_subset(sample) for sample in samples])  # [N]
    return credit_counts(samples) * (scored if scored.any() else ~scored)[:, None]


def chance(samples: Sequence[Sample]) -> float:
    """Percent right of a guess among each question's options."""
    return percent(1 / len(sample.options) if sample.options else 0.0 for sample in samples)


def score(samples: Sequence[Sample]) -> TaskScore:
    """Accuracy on the image subset in percent; details: its size, all questions, and how many answers were not read."""
    subset = [sample for sample in samples if in_subset(sample)]
    details = {
        "questions": len(samples),
        "image_subset": len(subset),
        "all": round(percent(sample.correct for sample in samples), 4),
        "failed": sum(sample.parsed == FAILED for sample in samples),
    }
    scored = subset or samples
    return task_score(scored, VERSION, counts, value, chance(scored), details)
