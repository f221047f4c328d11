"""MMBench: multiple choice under every circular rotation of the options.

Rules: MMBench's circular evaluation as in VLMEvalKit (vlmeval/dataset/utils/multiple_choice.py): a question is right
only if each of its rotations is; without a judge model ("exact_matching") an answer is read by can_infer of
vlmeval/utils/matching_util.py: first the one option letter among the last four words (punctuation taken as spaces),
then "answer is X", then the one option whose text occurs in an answer not longer than twice all options together.
"Vanilla" is every rotation on its own. LLaVA publishes the evaluation server's circular score, which asks a judge model
where this reading fails; MobileVLM V2's script runs an eval.py of its own, which is not in its repository.
"""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from device_bench.pictures import md5, table_of, table_rows
from device_bench.rows import EMPTY_CELLS, Row, id_of, need, text_of
from device_bench.tasks.base import (
    BenchQuestion,
    Editions,
    Sample,
    TaskScore,
    Truth,
    accuracy,
    by_group,
    credit_by,
    edition,
    percent,
    task_score,
)
from vlm.data.scenes.question import CHOOSE
from vlm.errors import UserError

VERSION = "mmbench-2"
LETTERS = "ABCD"
TABLES = (
    "mmbench_dev_20230712.tsv",
    "mmbench_dev_en_20231003.tsv",
    "MMBench_DEV_EN.tsv",
    "MMBench_DEV_EN_legacy.tsv",
    "MMBench_DEV_EN_V11.tsv",
)
EDITIONS: Editions = {
    (1176, 4377): "dev of July 2023 (as LLaVA-1.5)",
    (1164, 4329): "dev of October 2023, V1.0 (as MobileVLM V2)",
}
# As VLMEvalKit publishes them, of whole tables.
BY_MD5 = {"30c05be8f2f347a50be25aa067248184": "dev of V1.1, as VLMEvalKit has it"}
ROTATION = 1_000_000  # a rotated question's index is its number of rotations times this, plus the question's
REJECTIONS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_ANSWER = "Failed to obtain answer via API"
FAILED = "failed"
REFUSED = "refused"
value = accuracy
_PUNCTUATION = str.maketrans({mark: " " for mark in ".()[],:;!*#{}"})
_SENTENCE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS = 4


def load(data: Path) -> list[BenchQuestion]:
    """Read a table of the dev split, which holds every rotation; the pictures are in it."""
    table = need(data, TABLES, "MMBench's table")
    rows = table_rows(table)
    pictures = {row["index"]: image for row, image in rows}
    main = [(row, pictures.get(str(int(row["index"]) % ROTATION)) or image) for row, image in rows]
    return [question for row, image in main for question in from_row(row, image)]


def version(questions: Sequence[BenchQuestion]) -> dict[str, Any]:
    """Name the edition by its questions and their rotations, or by its table's checksum."""
    groups = len({question.group for question in questions})
    found = edition(questions, EDITIONS, groups, len(questions), groups=groups)
    tables = {table_of(question.image) for question in questions}
    named = BY_MD5.get(md5(table)) if len(tables) == 1 and (table := tables.pop()) else None
    return {**found, "edition": named or found["edition"]}


def from_row(row: Row, image: str) -> list[BenchQuestion]:
    """Read index, hint, question, A to D, answer and category.

    Raises:
        UserError: the row has no answer: it is of the test split, which only the evaluation server can score.
    """
    name, place = str(row["index"]).removesuffix(".0"), f"MMBench's question {row['index']}"
    if "answer" not in row:
        raise UserError(f"{place} has no answer: only the evaluation server scores the test split. Give the dev split.")
    options: list[str] = []
    for letter in LETTERS:
        if _empty(str(row.get(letter, ""))):
            break
        options.append(str(row[letter]))
    hint = str(row.get("hint", ""))
    asked = [text_of(row, ("question",), place), *(f"{a}. {b}" for a, b in zip(LETTERS, options, strict=False)), CHOOSE]
    prompt = "\n".join(asked if _empty(hint) else [hint, *asked])
    group, kind = str(int(name) % ROTATION), str(row.get("category", "unknown"))
    return [BenchQuestion(name, image or group, "mmbench", kind, "", group, prompt, str(row["answer"]), tuple(options))]


def _empty(cell: str) -> bool:
    """is_none of LLaVA's model_vqa_mmbench.py."""
    return cell in EMPTY_CELLS or cell.lower() in ("nan", "none")


def answer_key(row: Row, place: str) -> Hashable:
    """Take the index.

    Raises:
        UserError: the answers are of --all-rounds, which asks the rotations under one index.
    """
    if row.get("round_id"):
        raise UserError(
            f"{place}: round_id {row['round_id']}: answers of model_vqa_mmbench.py --all-rounds. The table holds every "
            "rotation already: answer it without --all-rounds."
        )
    return id_of(row, ("question_id", "index"), place)


def question_keys(question: BenchQuestion) -> tuple[Hashable, ...]:
    """Take the index."""
    return (question.id,)


def line(score: TaskScore) -> str:
    """The circular score, which papers quote as MMB."""
    return f"MMBench circular accuracy {score['score']:.2f}"


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """The letter of the option meant, "refused" for the letter Z, or "failed"."""
    letters = ascii_uppercase[: len(options)] if options else LETTERS
    if NO_ANSWER not in answer and any(sentence in answer for sentence in REJECTIONS):
        return REFUSED
    return (
        (_letter(answer, letters) if NO_ANSWER not in answer else "")
        or _option_text(answer, letters, options)
        or FAILED
    )


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
    answer = answer.lower()
    if len(answer) > 2 * sum(len(option) for option in options):
        return ""
    inside = [letter for letter, option in zip(letters, options, strict=False) if option.lower() in answer]
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
