"""Score answer files that others wrote: `pocketvlm eval --predictions FILE --tasks T --data DIR`.

Layouts read so far: LLaVA's answer lines ({"question_id", "prompt", "text"}) for POPE, ScienceQA and MME, LLaVA's
ScienceQA result ({"correct": [...], "incorrect": [...]}), and the MME tool's result folder (<category>.txt with
image, question, truth, answer between tabs).
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from device_bench.evaluate import Accuracy, grade, score
from device_bench.tasks.base import BenchQuestion, Sample
from vlm.data.scenes.question import SHORT, YES_OR_NO
from vlm.errors import UserError
from vlm.registry import did_you_mean

_OPTION = re.compile(r"^([A-E])\. (.*)$", re.MULTILINE)


def score_predictions(predictions: Path, task: str, data: Path) -> tuple[Accuracy, list[Sample]]:
    """Score an answer file by the task's official rules.

    Args:
        predictions: the answers, a file or for MME also the tool's result folder.
        task: "pope", "scienceqa" or "mme".
        data: the folder with the questions and labels; see the reader of each task below.
    Returns:
        The accuracy, in whose details "data" says which version of the questions it was, and the graded answers.
    Raises:
        UserError: an unknown task, a missing or broken file, or answers that do not belong to the questions.
    """
    readers: dict[str, Callable[[Path, Path], tuple[list[Sample], dict[str, Any]]]] = {
        "pope": read_pope,
        "scienceqa": read_scienceqa,
        "mme": read_mme,
    }
    if task not in readers:
        known = ", ".join(readers)
        raise UserError(f"no reader of answer files for task {task!r}.{did_you_mean(task, readers)} Known: {known}.")
    samples, version = readers[task](predictions, data)
    accuracy = score(samples)
    accuracy["tasks"][task]["details"]["data"] = version
    return accuracy, samples


def read_pope(predictions: Path, data: Path) -> tuple[list[Sample], dict[str, Any]]:
    """LLaVA's POPE answers; `data` holds llava_pope_test.jsonl and coco_pope_<setting>.json (here or below).

    LLaVA pairs answers and labels by their position within the setting. Here they are paired by image and question,
    which is the same for whole files and cannot shift when one has more lines (POPE random: 2,910 or 3,000).
    """
    asked = {row["question_id"]: row for row in _lines(_find(data, "llava_pope_test.jsonl"))}
    labels: dict[tuple[str, str, str], str] = {}
    sizes: Counter[str] = Counter()
    for path in sorted(data.rglob("coco_pope_*.json")):
        setting = path.stem.removeprefix("coco_pope_")
        for row in _lines(path):
            labels[setting, row["image"], row["text"]] = row["label"]
            sizes[setting] += 1
    samples = []
    for row in _lines(predictions):
        question = asked.get(row["question_id"])
        if question is None:
            raise UserError(
                f"{predictions}: question_id {row['question_id']!r} is not in llava_pope_test.jsonl. Give "
                "the folder of the questions that were answered with --data."
            )
        text, setting = question["text"].replace(SHORT, "").strip(), question["category"]
        label = labels.get((setting, question["image"], text))
        if label is None:
            where = f"{setting} {question['image']} {text!r}"
            raise UserError(
                f"{data}: no label for {where}: the labels are another version of POPE. Give the one "
                "whose questions were answered with --data."
            )
        name = str(row["question_id"])
        asked_now = BenchQuestion(name, question["image"], "pope", "coco", setting, name, question["text"], label)
        samples.append(grade(asked_now, row["text"]))
    _complete(predictions, len(samples), len(asked))
    return samples, {"labels": dict(sizes)}


def read_scienceqa(predictions: Path, data: Path) -> tuple[list[Sample], dict[str, Any]]:
    """LLaVA's ScienceQA answers or result file; `data` holds llava_test_CQM-A.json.

    A question without an answer counts as wrong, as in LLaVA's script.
    """
    answers = {str(row["question_id"]): row.get("text", row.get("pred", "")) for row in _scienceqa_rows(predictions)}
    questions = _json(_find(data, "llava_test_CQM-A.json"))
    samples = []
    for row in questions:
        prompt = row["conversations"][0]["value"]
        options = tuple(text for _, text in _last_options(prompt))
        image, name = row.get("image", ""), str(row["id"])
        kind = "image" if image else "text"
        truth = row["conversations"][1]["value"]
        question = BenchQuestion(name, image, "scienceqa", kind, "", name, prompt, truth, options)
        samples.append(grade(question, answers.pop(name, "FAILED")))
    if answers:
        raise UserError(
            f"{predictions}: question {next(iter(answers))!r} is not in {data}'s test split. Give the "
            "folder of the questions that were answered with --data."
        )
    return samples, {"questions": len(samples), "with_image": sum(bool(sample.image) for sample in samples)}


def read_mme(predictions: Path, data: Path) -> tuple[list[Sample], dict[str, Any]]:
    """MME answers: the tool's result folder, which holds the truth itself, or LLaVA's answer lines.

    For LLaVA's lines `data` is the benchmark's release (<category>/[questions_answers_YN/]<image>.txt) or a result
    folder. As in convert_answer_to_mme.py, answers whose question the truth lacks are left out; "left_out" counts them.
    """
    if predictions.is_dir():
        rows = list(_mme_results(predictions))
        return _mme_samples(rows), {"questions": len(rows), "left_out": 0}
    truth = {(c, Path(i).stem, _mme_key(q)): (q, t) for c, i, q, t, _ in _mme_truth(data)}
    found, left_out = [], 0
    for row in _lines(predictions):
        category, image = row["question_id"].split("/")[0], Path(row["question_id"]).name
        known = truth.get((category, Path(image).stem, _mme_key(row["prompt"])))
        left_out += known is None
        if known is not None:
            found.append((category, image, *known, row["text"]))
    if not found:
        raise UserError(f"{predictions}: none of its questions is in {data}. Is this MME, and the folder its release?")
    return _mme_samples(found), {"questions": len(found), "left_out": left_out}


MmeRow = tuple[str, str, str, str, str]  # category, image, question, truth, answer


def _mme_samples(rows: list[MmeRow]) -> list[Sample]:
    """Pairs are an image's questions two by two in file order, as in the tool."""
    seen: dict[tuple[str, str], int] = defaultdict(int)
    samples = []
    for category, image, question, truth, answer in rows:
        number = seen[category, image]
        seen[category, image] += 1
        place = f"{category}/{image}"
        asked = BenchQuestion(
            f"{place}#{number}", place, "mme", category, category, f"{place}#{number // 2}", question, truth
        )
        samples.append(grade(asked, answer))
    return samples


def _mme_key(question: str) -> str:
    return " ".join(question.replace(SHORT, "").replace(YES_OR_NO, "").split())


def _mme_results(folder: Path) -> Iterator[MmeRow]:
    for path in sorted(folder.glob("*.txt")):
        for number, line in enumerate(path.read_text().split("\n"), 1):
            if not line:
                continue
            cells = line.split("\t")
            if len(cells) != 4 or cells[2].lower() not in ("yes", "no"):
                expected = "image, question, Yes or No, answer between tabs"
                raise UserError(
                    f"{path}:{number}: expected {expected}; found {line!r}. Run the "
                    "model on MME again, or repair the line."
                )
            image, question, truth, answer = cells
            yield path.stem, image, question, truth, answer


def _mme_truth(data: Path) -> Iterator[MmeRow]:
    files = [path for path in sorted(data.rglob("*.txt")) if path.parent != data]
    if not files:
        yield from _mme_results(data)
    for path in files:
        folder = path.parent.parent if path.parent.name == "questions_answers_YN" else path.parent
        for line in path.read_text().splitlines():
            question, _, truth = line.strip().partition("\t")
            yield folder.name, path.name, question, truth, ""


def _scienceqa_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file() and path.read_text()[:1_000].lstrip("{ \n\r\t").startswith('"correct"'):
        tree = _json(path)
        yield from [*tree["correct"], *tree["incorrect"]]
    else:
        yield from _lines(path)


def _last_options(prompt: str) -> list[tuple[str, str]]:
    """The lettered lines at the end of a prompt; a context above may have some of its own."""
    found = _OPTION.findall(prompt)
    starts = [index for index, (letter, _) in enumerate(found) if letter == "A"]
    return found[starts[-1] :] if starts else []


def _complete(predictions: Path, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(f"{predictions}: {found} answers found, {expected} questions expected. Finish the run first.")


def _find(data: Path, name: str) -> Path:
    found = sorted(data.rglob(name)) if data.is_dir() else []
    if not found:
        raise UserError(f"{data}: no {name} here or below. Give the folder that holds it with --data.")
    return found[0]


def _json(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file. Correct the path of --predictions or --data.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}). Download or write the file again.") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file. Correct the path of --predictions or --data.")
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not a JSON line ({error}). Write the answers again, one object a line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{number}: a JSON object was expected, found {type(row).__name__}. "
                "Write the answers again, one object a line."
            )
        yield row
