"""GQA: exact match of a short answer.

Rules: GQA's own eval.py counts an answer that equals the gold answer, nothing else; LLaVA-1.5 and MobileVLM V2 hand
it the answer in lower case without full stops at the end (LLaVA scripts/convert_gqa_for_eval.py). The answers of a file
for eval.py itself are therefore compared as they are. VLMEvalKit differs
(vlmeval/dataset/utils/vqa_eval.py): it also strips spaces and lowers the gold answer, but keeps a full stop, so that
"red." is wrong there.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from device_bench.pictures import picture_folder, table_rows
from device_bench.rows import Row, find, id_of, need, read_json, text_of
from device_bench.tasks.base import (
    BenchQuestion,
    Editions,
    Sample,
    TaskScore,
    Truth,
    accuracy,
    credit_by,
    credit_counts,
    edition,
    task_score,
)
from vlm.data.scenes.question import short_prompt

VERSION = "gqa-1"
QUESTIONS = ("testdev_balanced_questions.json",)
TABLES = ("GQA_TestDev_Balanced.tsv",)
EDITIONS: Editions = {(12578,): "testdev balanced of GQA 1.2"}
AS_GIVEN = "questionId"  # the column that only files for eval.py have
OPEN = "query"  # the structural type whose questions are open; every other is binary in eval.py
counts, value = credit_counts, accuracy


def load(data: Path) -> list[BenchQuestion]:
    """Read GQA's questions1.2/testdev_balanced_questions.json, or VLMEvalKit's table.

    Pictures: images/ beside the questions, or one folder up.
    """
    path = find(data, QUESTIONS)
    if path is None:
        table = need(data, (*QUESTIONS, *TABLES), "GQA's questions")
        return [question for row, image in table_rows(table) for question in from_row(row, image)]
    rows = {name: row for name, row in read_json(path).items() if row.get("isBalanced", True)}
    names = [f"{row['imageId']}.jpg" for row in rows.values()]
    folder = picture_folder([path.parent / "images", path.parent.parent / "images"], names)
    return [
        BenchQuestion(
            name,
            str(folder / image),
            "gqa",
            row.get("types", {}).get("structural") or "unknown",
            "",
            name,
            short_prompt(row["question"]),
            row["answer"],
        )
        for (name, row), image in zip(rows.items(), names, strict=True)
    ]


def version(questions: Sequence[BenchQuestion]) -> dict[str, Any]:
    """Name the edition by its counts."""
    return edition(questions, EDITIONS)


def from_row(row: Row, image: str) -> list[BenchQuestion]:
    """Read index, question and answer."""
    name, place = str(row["index"]), f"GQA's question {row['index']}"
    prompt = short_prompt(text_of(row, ("question",), place))
    return [BenchQuestion(name, image, "gqa", "unknown", "", name, prompt, text_of(row, ("answer",), place))]


def answer_key(row: Row, place: str) -> Hashable:
    """Take the id under LLaVA's name or, in files for GQA's eval.py, GQA's."""
    return id_of(row, ("question_id", "questionId", "index"), place)


def question_keys(question: BenchQuestion) -> tuple[Hashable, ...]:
    """Take the id."""
    return (question.id,)


def line(score: TaskScore) -> str:
    """What eval.py prints last and papers quote."""
    return f"GQA accuracy {score['score']:.2f}"


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """Lower case, full stops at the end removed."""
    return answer.rstrip(".").lower()


def correct(parsed: str, truth: Truth) -> float:
    """1 if the parsed answer is the truth."""
    return float(parsed == truth)


def chance(samples: Sequence[Sample]) -> float:
    """Percent right when each kind of question gets its most frequent answer."""
    kinds: dict[str, Counter[Truth]] = defaultdict(Counter)
    for sample in samples:
        kinds[sample.kind][sample.truth] += 1
    return 100 * sum(max(answers.values()) for answers in kinds.values()) / len(samples)


def score(samples: Sequence[Sample]) -> TaskScore:
    """Accuracy in percent; details: accuracy per kind, and of binary and open questions as eval.py prints them."""
    details: dict[str, Any] = {"kinds": credit_by(samples, lambda sample: sample.kind)}
    if any(sample.kind == OPEN for sample in samples):
        details["types"] = credit_by(samples, lambda sample: "open" if sample.kind == OPEN else "binary")
    return task_score(samples, VERSION, counts, value, chance(samples), details)
