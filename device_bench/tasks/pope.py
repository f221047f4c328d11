"""POPE: is this object in the image, in three settings.

Rules: POPE's evaluate.py and LLaVA's eval_pope.py, which read alike: of the text before the first full stop, without
commas and cut at spaces, the words "No", "not" and "no" mean no; everything else, an empty answer too, means yes.
Precision, recall and F1 are of "yes". The published number is the mean of the three settings' F1 (LLaVA-1.5,
MobileVLM V2). VLMEvalKit differs: it asks for the word yes or no anywhere in lower case, counts what has neither as
no, and publishes the F1 over all answers together.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from device_bench.pictures import picture_folder, table_rows
from device_bench.rows import Row, find, id_of, need, read_rows, text_of
from device_bench.tasks.base import (
    UNKNOWN,
    BenchQuestion,
    Sample,
    TaskScore,
    Truth,
    digest,
    edition,
    mean_present,
    ratio,
    task_score,
)
from vlm.data.scenes.question import SHORT, short_prompt
from vlm.errors import UserError

VERSION = "pope-1"
SETTINGS = ("random", "popular", "adversarial")
PROMPTS = ("llava_pope_test.jsonl",)
TABLES = ("POPE.tsv",)
# SHA-256 (first 12 digits) of a setting's sorted questions and labels, by the label file's commit in POPE's repository;
# the counts alone cannot tell the later editions apart, and tables do not name the pictures.
LABELS = {
    "aa032bf6b206": "e3e3926 of August 2023 (as LLaVA and MobileVLM)",
    "13c4eca910ae": "e3e3926 of August 2023 (as LLaVA and MobileVLM)",
    "27cb07cc5a01": "e3e3926 of August 2023 (as LLaVA and MobileVLM)",
    "fc6655a79728": "7ef3026 of August 2023",
    "f425496c307c": "7ef3026 of August 2023",
    "b224f7577ad3": "7ef3026 of August 2023",
    "770e979858eb": "edebdda of October 2023",
    "6b67207db61c": "edebdda of October 2023",
    "6591f0eabc90": "edebdda of October 2023",
    "ecbbc1ae09fa": "109985c of November 2023",
}
NO_WORDS = {"No", "not", "no"}


def load(data: Path) -> list[BenchQuestion]:
    """Read coco_pope_<setting>.json, with LLaVA's llava_pope_test.jsonl if it is there, or VLMEvalKit's table.

    Pictures: val2014/<image> beside LLaVA's file or the labels' folder.
    """
    paths = {setting: find(data, [f"coco_pope_{setting}.json"]) for setting in SETTINGS}
    labels = {setting: read_rows(path) for setting, path in paths.items() if path}
    prompts = find(data, PROMPTS)
    if not labels:
        table = need(data, (*TABLES, "coco_pope_random.json"), "POPE's questions and labels")
        return [question for row, image in table_rows(table) for question in from_row(row, image)]
    base = (prompts or next(path for path in paths.values() if path)).parent
    names = [str(row["image"]) for rows in labels.values() for row in rows]
    folder = picture_folder([base / "val2014", base.parent / "val2014", base / "images"], names)
    asked = _llava_order(prompts, labels, data) if prompts else _own_order(labels)
    return [
        BenchQuestion(
            name, str(folder / row["image"]), "pope", "coco", setting, name, short_prompt(row["text"]), row["label"]
        )
        for name, setting, row in asked
    ]


def version(questions: Sequence[BenchQuestion]) -> dict[str, Any]:
    """Name each setting's edition by the digest of its labels, which the counts do not tell apart."""
    labels: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        asked = question.prompt.replace(SHORT, "").strip()
        labels[question.category].append(f"{asked}\t{label(question.truth)}")
    sizes = {setting: len(lines) for setting, lines in labels.items()}
    names = {setting: LABELS.get(digest(sorted(lines)), UNKNOWN) for setting, lines in labels.items()}
    return {**edition(questions, {}, labels=sizes), "edition": names}


def _llava_order(prompts: Path, labels: dict[str, list[Row]], data: Path) -> list[tuple[str, str, Row]]:
    """Labels by LLaVA's question ids.

    LLaVA pairs answers and labels by their position within the setting. Here they are paired by image and question,
    which is the same for whole files and cannot shift when one has more lines (POPE random: 2,910 or 3,000).
    """
    known = {(setting, row["image"], row["text"]): row for setting, rows in labels.items() for row in rows}
    found = []
    for row in read_rows(prompts):
        if row["category"] not in labels:
            continue
        key = row["category"], row["image"], row["text"].replace(SHORT, "").strip()
        if key not in known:
            raise UserError(
                f"{data}: no label for {' '.join(map(str, key))!r}: the labels are another version of POPE than "
                f"{prompts.name}, which has random with 2,910 lines. Give the labels that it was made from with --data."
            )
        found.append((str(row["question_id"]), row["category"], known[key]))
    return found


def _own_order(labels: dict[str, list[Row]]) -> list[tuple[str, str, Row]]:
    prefix = "{}-" if len(labels) > 1 else ""  # each setting counts from 1
    return [
        (f"{prefix.format(setting)}{row['question_id']}", setting, row)
        for setting, rows in labels.items()
        for row in rows
    ]


def from_row(row: Row, image: str) -> list[BenchQuestion]:
    """Read index, question, answer and category; a row whose category names several settings is asked in each."""
    place = f"POPE's question {row['index']}"
    prompt, truth = short_prompt(text_of(row, ("question",), place)), text_of(row, ("answer",), place).lower()
    image = image or str(row.get("image_path") or row["index"])
    return [
        BenchQuestion(f"{setting}-{row['index']}", image, "pope", "coco", setting, str(row["index"]), prompt, truth)
        for setting in text_of(row, ("category",), place).split(",")
    ]


def answer_key(row: Row, place: str) -> Hashable:
    """Take LLaVA's id."""
    return id_of(row, ("question_id", "index"), place)


def named(
    rows: Sequence[Row], questions: Sequence[BenchQuestion], file: Path
) -> tuple[Sequence[Row], Sequence[BenchQuestion]]:
    """Give POPE's own answers, which have no ids but stand in the order of one setting's labels, their ids.

    Returns:
        The answers, and the questions of their setting; other answer files as they are, with all questions.
    Raises:
        UserError: the answers are in no setting's order, or have LLaVA's ids, which the data lacks.
    """
    if not rows or "question" not in rows[0] or "question_id" in rows[0]:
        if "question_id" in rows[0] and len({one.category for one in questions}) > 1 and _own_ids(questions):
            raise UserError(
                f"{file}: its ids are LLaVA's, and {PROMPTS[0]}, which says what they ask, is not beside the labels. "
                "Give the folder that holds both with --data."
            )
        return rows, questions
    asked = [_plain(str(row.get("question"))) for row in rows]
    for setting in SETTINGS:
        members = [question for question in questions if question.category == setting]
        if [_plain(question.prompt) for question in members] == asked:
            return [{**row, "question_id": one.id} for row, one in zip(rows, members, strict=True)], members
    raise UserError(
        f"{file}: {len(asked)} answers without question_id, whose questions are those of no setting's labels, in their "
        "order. Give the folder with the labels that were asked with --data."
    )


def _own_ids(questions: Sequence[BenchQuestion]) -> bool:
    return all(question.id.startswith(question.category) for question in questions)


def _plain(prompt: str) -> str:
    return prompt.replace(SHORT, "").strip().lower()


def question_keys(question: BenchQuestion) -> tuple[Hashable, ...]:
    """Take the id."""
    return (question.id,)


def line(score: TaskScore) -> str:
    """The mean that papers quote, and what eval_pope.py prints of each setting."""
    each = ", ".join(f"{name} {row['f1']:.2f}" for name, row in score["details"]["settings"].items())
    return f"POPE F1 {score['score']:.2f} ({each})"


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """ "yes" or "no"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if NO_WORDS.intersection(words) else "yes"


def label(truth: Truth) -> str:
    """ "no" or, for every other label, "yes"."""
    return "no" if isinstance(truth, str) and truth.lower() == "no" else "yes"


def correct(parsed: str, truth: Truth) -> float:
    """1 if the parsed word is the label."""
    return float(parsed == label(truth))


def settings(samples: Sequence[Sample]) -> list[str]:
    """The settings asked, sorted."""
    return sorted({sample.category for sample in samples})


def counts(samples: Sequence[Sample]) -> np.ndarray:
    """[said yes and is, said yes, is, right, asked] for each setting, [N, 5 * S]."""
    column = {setting: index for index, setting in enumerate(settings(samples))}
    table = np.zeros((len(samples), len(column), 5))
    for row, sample in enumerate(samples):
        said, there = sample.parsed == "yes", label(sample.truth) == "yes"
        table[row, column[sample.category]] = (said and there, said, there, said == there, 1)
    return table.reshape(len(samples), -1)  # [N, 5 * S]


def value(sums: np.ndarray) -> np.ndarray:
    """Mean over settings of F1 = 2 TP / (said yes + is), percent: [..., 5 * S] -> [...]."""
    table = sums.reshape(*sums.shape[:-1], -1, 5)  # [..., S, 5]
    return 100 * mean_present(ratio(2 * table[..., 0], table[..., 1] + table[..., 2]), table[..., 4])


def chance(samples: Sequence[Sample]) -> float:
    """Mean F1 of always saying yes."""
    table = counts(samples).sum(axis=0).reshape(-1, 5)  # [S, 5]
    return 100 * float(mean_present(ratio(2 * table[:, 2], table[:, 4] + table[:, 2]), table[:, 4]))


def details(samples: Sequence[Sample]) -> dict[str, Any]:
    """Precision, recall, F1, accuracy and share of yes per setting, percent."""
    table = counts(samples).sum(axis=0).reshape(-1, 5)  # [S, 5]
    columns = {
        "precision": ratio(table[:, 0], table[:, 1]),
        "recall": ratio(table[:, 0], table[:, 2]),
        "f1": ratio(2 * table[:, 0], table[:, 1] + table[:, 2]),
        "accuracy": ratio(table[:, 3], table[:, 4]),
        "yes_ratio": ratio(table[:, 1], table[:, 4]),
    }
    rows = {
        setting: {**{name: round(100 * float(column[i]), 4) for name, column in columns.items()}, "n": int(table[i, 4])}
        for i, setting in enumerate(settings(samples))
    }
    return {"settings": rows, "accuracy": round(100 * float(table[:, 3].sum() / table[:, 4].sum()), 4)}


def score(samples: Sequence[Sample]) -> TaskScore:
    """Mean F1 over the settings in percent; details per setting."""
    return task_score(samples, VERSION, counts, value, chance(samples), details(samples))
