"""Score answer files that others wrote: `pocketvlm eval --predictions FILE --tasks T --data DIR`.

Layouts: LLaVA's and MobileVLM's answer lines ({"question_id", "prompt", "text"}), predictions for GQA's eval.py,
LLaVA's ScienceQA result ({"correct": [...], "incorrect": [...]}), its MMBench upload (.xlsx), the MME tool's result
folder, and VLMEvalKit's results (.xlsx, .tsv, .csv, .json: the question's columns and `prediction`), which hold the
truth themselves.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from device_bench import vlmevalkit
from device_bench.evaluate import Accuracy, grade, publish, score, task
from device_bench.rows import INDEX, PREDICTION, TRUTH, Row, find, read_rows, text_of
from device_bench.tasks import mme
from device_bench.tasks.base import BenchQuestion, Sample, Task
from vlm.data.scenes.question import FAMILIES
from vlm.errors import UserError
from vlm.registry import did_you_mean

ANSWER = ("text", "prediction", "pred", "answer")  # LLaVA, GQA and VLMEvalKit, LLaVA's ScienceQA result, POPE
Pairs = list[tuple[BenchQuestion, str]]


def score_predictions(predictions: Path, name: str, data: Path | None) -> tuple[Accuracy, list[Sample]]:
    """Score an answer file by the benchmark's official rules.

    Args:
        predictions: the answers: a file, or for MME also the tool's result folder.
        name: one of the six benchmarks.
        data: folder with the questions and labels (docs/benchmarks.md); None for files that hold the truth.
    Returns:
        The accuracy, in whose details "data" says which edition of the questions it was and "line" is the score as
        people publish it ("vlmevalkit" as VLMEvalKit prints it, for its files), and the graded answers.
    Raises:
        UserError: an unknown benchmark, a missing or broken file, or answers that do not belong to the questions.
    """
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"no reader of answer files for task {name!r}.{did_you_mean(name, FAMILIES)} Known: {known}.")
    rules, from_kit = task(name), False
    if predictions.is_dir():
        pairs, version = _folder(predictions, name, rules)
    else:
        rows = read_rows(predictions)
        if not rows:
            raise UserError(f"{predictions}: no answers in it. Run the model again.")
        from_kit = PREDICTION in rows[0] and INDEX in rows[0]
        pairs, version = (_from_vlmevalkit if from_kit else _from_lines)(predictions, rows, rules, data)
    samples = [grade(question, answer) for question, answer in pairs]
    accuracy = publish(score(samples), {name: version})
    if from_kit:
        accuracy["tasks"][name]["details"]["vlmevalkit"] = vlmevalkit.line(name, samples)
    return accuracy, samples


def _folder(folder: Path, name: str, rules: Task) -> tuple[Pairs, dict[str, Any]]:
    pairs = mme.paired(mme.result_lines(folder)) if name == "mme" else []
    if not pairs:
        raise UserError(f"{folder}: a folder; expected a file of answers to {name}. (Only MME's tool writes a folder.)")
    return pairs, rules.version([question for question, _ in pairs])


def _from_lines(predictions: Path, rows: Sequence[Row], rules: Task, data: Path | None) -> tuple[Pairs, dict[str, Any]]:
    if data is None:
        raise UserError(f"{predictions}: holds no right answers. Give the folder with the questions with --data.")
    questions = rules.load(data)
    answers: dict[Hashable, str] = {}
    for number, row in enumerate(rows, 1):
        place = f"{predictions}: answer {number}"
        answers[rules.answer_key(row, place)] = text_of(row, ANSWER, place)
    return _match(predictions, answers, questions, rules, data)


def _match(
    predictions: Path, answers: dict[Hashable, str], questions: Sequence[BenchQuestion], rules: Task, data: Path
) -> tuple[Pairs, dict[str, Any]]:
    """Every question with its answer; answers to no question of the data are left out and counted."""
    pairs, missing, used = [], [], set()
    for question in questions:
        key = next((key for key in rules.question_keys(question) if key in answers), None)
        if key is None:
            missing.append(question)
            pairs.append((question, "FAILED"))
        else:
            used.add(key)
            pairs.append((question, answers[key]))
    strangers = [key for key in answers if key not in used]
    wrong_if_missing = getattr(rules, "UNANSWERED_IS_WRONG", False)
    if not used or (strangers and missing) or (missing and not wrong_if_missing):
        example = f"; no question is {strangers[0]!r}" if strangers else ""
        first = f", first {missing[0].id!r}" if missing else ""
        raise UserError(
            f"{predictions}: {len(used)} of the {len(questions)} questions in {data} are answered; "
            f"{len(missing)} are not{first}{example}. Give the folder of the questions that were answered with --data, "
            "or finish the run."
        )
    return pairs, {**rules.version(questions), "left_out": len(strangers), "unanswered": len(missing)}


def _from_vlmevalkit(
    predictions: Path, rows: Sequence[Row], rules: Task, data: Path | None
) -> tuple[Pairs, dict[str, Any]]:
    """Questions from the file itself where it has the answers, else from the benchmark's table in `data`."""
    table = find(data, rules.TABLES) if data else None
    if TRUTH not in rows[0] and table is None:
        tables = " or ".join(rules.TABLES)
        raise UserError(f"{predictions}: has no column {TRUTH!r}. Give the folder that holds {tables} with --data.")
    known = {row[INDEX]: row for row in read_rows(table)} if table and TRUTH not in rows[0] else {}
    pairs: Pairs = []
    for number, row in enumerate(rows, 1):
        place = f"{predictions}: row {number}"
        index = text_of(row, (INDEX,), place)
        if known and index not in known:
            raise UserError(
                f"{place}: index {index} is not in {table}, which is another edition. Give the one answered."
            )
        merged = {**known.get(index, {}), **row, INDEX: index}
        answer = str(row.get(PREDICTION, ""))
        pairs += [(question, answer) for question in rules.from_row(merged, str(merged.get("image", "")))]
    questions = [question for question, _ in pairs]
    if table and not known:
        _complete(predictions, questions, rules.load(table.parent))
    return pairs, rules.version(questions)


def _complete(predictions: Path, found: Sequence[BenchQuestion], expected: Sequence[BenchQuestion]) -> None:
    if missing := {question.id for question in expected} - {question.id for question in found}:
        raise UserError(
            f"{predictions}: {len(missing)} of {len(expected)} questions have no answer, first {min(missing)}. Finish "
            "the run first, or give the table that was answered."
        )
