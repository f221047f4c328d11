"""Score answer files that others wrote: `pocketvlm eval --predictions FILE --tasks T --data DIR`.

Layouts: LLaVA's and MobileVLM's answer lines ({"question_id", "prompt", "text"}), predictions for GQA's eval.py, POPE's
own answers of one setting ({"question", "answer"}), LLaVA's ScienceQA results ({"correct": [...], "incorrect": [...]},
{"outputs": {...}}) and those of ScienceQA's own script ({"results": {...}}), LLaVA's MMBench upload (.xlsx), the MME
tool's result folder, and VLMEvalKit's results (.xlsx, .tsv, .csv, .json: the question's columns and `prediction`),
which hold the truth themselves.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from device_bench import vlmevalkit
from device_bench.evaluate import Accuracy, grade, publish, score, task
from device_bench.rows import EMPTY_CELLS, INDEX, PREDICTION, SAID, TRUTH, Row, answer_of, find, id_of, read_rows
from device_bench.tasks import mme
from device_bench.tasks.base import BenchQuestion, Sample, Task
from vlm.data.scenes.question import FAMILIES
from vlm.errors import UserError
from vlm.registry import did_you_mean

ANSWER = (*SAID, "answer")  # LLaVA, GQA and VLMEvalKit, LLaVA's ScienceQA result; POPE
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
    rules, from_kit, as_given = task(name), False, False
    if predictions.is_dir():
        pairs, version = _folder(predictions, name, rules)
    else:
        rows = read_rows(predictions)
        if not rows:
            raise UserError(f"{predictions}: no answers in it. Run the model again.")
        from_kit = INDEX in rows[0] and any(PREDICTION in row for row in rows)  # empty cells are left out
        as_given = getattr(rules, "AS_GIVEN", None) in rows[0]
        pairs, version = (_from_vlmevalkit if from_kit else _from_lines)(predictions, rows, rules, data)
    samples = [grade(question, answer, as_given=as_given) for question, answer in pairs]
    accuracy = publish(score(samples), {name: version})
    if from_kit:
        read = samples
        if predictions.suffix.lower() != ".json":  # VLMEvalKit makes text of pandas' NaN
            read = [replace(sample, answer="nan") if sample.answer in EMPTY_CELLS else sample for sample in samples]
        accuracy["tasks"][name]["details"]["vlmevalkit"] = vlmevalkit.line(name, read)
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
    if named := getattr(rules, "named", None):
        rows, questions = named(rows, questions, predictions)
    answers: dict[Hashable, str] = {}
    for number, row in enumerate(rows, 1):
        place = f"{predictions}: answer {number}"
        answers[rules.answer_key(row, place)] = answer_of(row, ANSWER, place)
    pairs, version = _match(predictions, answers, questions, rules, data)
    return pairs, {**version, "repeated": len(rows) - len(answers)}


def _match(
    predictions: Path, answers: dict[Hashable, str], questions: Sequence[BenchQuestion], rules: Task, data: Path
) -> tuple[Pairs, dict[str, Any]]:
    """Every question with its answer; answers to no question of the data are left out and counted."""
    pairs, missing, used = [], [], set()
    unanswered = getattr(rules, "unanswered", None)
    for question in questions:
        key = next((key for key in rules.question_keys(question) if key in answers), None)
        if key is None:
            missing.append(question)
            pairs.append((unanswered(question) if unanswered else question, "FAILED"))
        else:
            used.add(key)
            pairs.append((question, answers[key]))
    strangers = [key for key in answers if key not in used]
    if not used or (strangers and missing) or (missing and not unanswered):
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
    lacking = read_rows(table) if table and TRUTH not in rows[0] else []
    known = {id_of(row, (INDEX,), str(table)): row for row in lacking}
    places = ((f"{predictions}: row {number}", row) for number, row in enumerate(rows, 1))
    last = {id_of(row, (INDEX,), place): (place, row) for place, row in places}  # of repeated answers
    pairs: Pairs = []
    for index, (place, row) in last.items():
        if known and index not in known:
            raise UserError(
                f"{place}: index {index} is not in {table}, which is another edition. Give the one answered."
            )
        merged = {**known.get(index, {}), **row, INDEX: index}
        answer = answer_of({PREDICTION: "", **row}, (PREDICTION,), place)
        pairs += [(question, answer) for question in rules.from_row(merged, str(merged.get("image", "")))]
    questions = [question for question, _ in pairs]
    if table and not known:
        _complete(predictions, questions, rules.load(table.parent))
    return pairs, {**rules.version(questions), "repeated": len(rows) - len(last)}


def _complete(predictions: Path, found: Sequence[BenchQuestion], expected: Sequence[BenchQuestion]) -> None:
    if missing := {question.id for question in expected} - {question.id for question in found}:
        raise UserError(
            f"{predictions}: {len(missing)} of {len(expected)} questions have no answer, first {min(missing)}. Finish "
            "the run first, or give the table that was answered."
        )
