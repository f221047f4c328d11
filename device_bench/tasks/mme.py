"""MME: yes/no questions in pairs about one image.

Rules: MME's eval_tool/calculation.py. The answer in lower case is "yes" or "no" if it is that word, else by what its
first four characters contain, "yes" before "no", else "other", which is wrong. Per category acc = right answers and
acc+ = images with both answers right, in percent; the category's score is acc + acc+ (at most 200), perception is the
sum over its ten categories (at most 2000), cognition over its four (800). LLaVA writes the tool's files with
convert_answer_to_mme.py, which stops at a question that the ground truth lacks; the tool stops at a category that is
missing and at a picture with one question. lmms-eval differs: it strips spaces and full stops first and reads a lone
"y" or "n". For averages over families the score here is the mean over categories of (acc + acc+) / 2.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from device_bench.pictures import table_rows
from device_bench.rows import UTF_8, Row, find, folders, need, text_of
from device_bench.tasks.base import (
    BenchQuestion,
    Editions,
    Sample,
    TaskScore,
    Truth,
    by_group,
    edition,
    mean_present,
    ratio,
    task_score,
)
from vlm.data.scenes.question import SHORT, YES_OR_NO, short_prompt
from vlm.errors import UserError

VERSION = "mme-1"
TRUTHS = "questions_answers_YN"
TABLES = ("MME.tsv",)
EDITIONS: Editions = {
    (2374,): "MME_Benchmark_release_version",
    (2370,): "the eval tool's example files (4 questions fewer)",
}
SUFFIXES = (".jpg", ".png")
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = (*PERCEPTION, *COGNITION)
OTHER = "other"
CHANCE = 37.5  # two independent coin flips: acc 50, acc+ 25


Line = tuple[str, str, str, str, str]  # category, picture's path, question, truth, answer


def load(data: Path) -> list[BenchQuestion]:
    """Read MME's release (<category>/[questions_answers_YN/]<picture>.txt), a folder of the tool's result files, or
    VLMEvalKit's table.

    Pictures: beside the release's .txt files, or in images/ next to questions_answers_YN/.
    """
    if table := find(data, TABLES):
        return [question for row, image in table_rows(table) for question in from_row(row, image)]
    lines = list(_release(data)) or list(result_lines(_richest(data, [f"{name}.txt" for name in CATEGORIES])))
    if not lines:
        need(data, (*TABLES, f"{CATEGORIES[0]}.txt"), "MME's questions")
    return [question for question, _ in paired(lines)]


def _richest(data: Path, names: Sequence[str]) -> Path:
    """The folder that holds the most of some names, the nearest of equals."""
    return max(folders(data), key=lambda folder: sum((folder / name).exists() for name in names), default=data)


def paired(lines: Iterable[Line]) -> list[tuple[BenchQuestion, str]]:
    """Questions with answers; pairs are a picture's questions two by two in file order, as in the tool.

    Raises:
        UserError: a picture has an odd number of questions.
    """
    seen: dict[tuple[str, str], int] = defaultdict(int)
    found = []
    for category, image, question, truth, answer in lines:
        number = seen[category, image]
        seen[category, image] += 1
        place = f"{category}/{Path(image).name}"
        asked = short_prompt(question.replace(YES_OR_NO, "").strip())
        group, name = f"{place}#{number // 2}", f"{place}#{number}"
        found.append((BenchQuestion(name, image, "mme", category, category, group, asked, truth), answer))
    if odd := [(category, image) for (category, image), count in seen.items() if count % 2]:
        category, image = odd[0]
        raise UserError(
            f"MME {category}: {Path(image).name} has {seen[odd[0]]} questions; pairs were expected. The file was cut: "
            "write it again, or download it again."
        )
    return found


def result_lines(folder: Path) -> Iterator[Line]:
    """Lines of the tool's result files: <category>.txt with picture, question, truth, answer between tabs.

    Raises:
        UserError: a line is of another form, or some categories are there and others are missing.
    """
    paths = [folder / f"{category}.txt" for category in sorted(CATEGORIES)]
    missing = [path.name for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        return
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} missing; MME's sums are over 14 categories. Finish the run.")
    for path in paths:
        for number, line in enumerate(path.read_text(encoding=UTF_8).split("\n"), 1):
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
            yield path.stem, f"{path.stem}/{image}", question, truth, answer


def _release(data: Path) -> Iterator[Line]:
    release = _richest(data, CATEGORIES)
    for folder in (release / category for category in CATEGORIES):
        category = folder.name
        texts, pictures = (folder / TRUTHS, folder / "images") if (folder / TRUTHS).is_dir() else (folder, folder)
        for path in sorted(texts.glob("*.txt")):
            places = [pictures / f"{path.stem}{suffix}" for suffix in SUFFIXES]
            image = str(next((place for place in places if place.is_file()), places[0]))
            for line in path.read_text(encoding=UTF_8).split("\n"):
                question, _, truth = line.strip().partition("\t")
                if question:
                    yield category, image, question, truth, ""


def version(questions: Sequence[BenchQuestion]) -> dict[str, Any]:
    """Name the edition by its counts."""
    return edition(questions, EDITIONS)


def from_row(row: Row, image: str) -> list[BenchQuestion]:
    """Read index, question, answer, category and, for the pairs, image_path."""
    place = f"MME's question {row['index']}"
    category, question = text_of(row, ("category",), place), text_of(row, ("question",), place)
    group = f"{category}/{text_of(row, ('image_path', 'index'), place)}"
    asked = short_prompt(question.replace(YES_OR_NO, "").strip())
    name, truth = str(row["index"]), text_of(row, ("answer",), place)
    return [BenchQuestion(name, image or group, "mme", category, category, group, asked, truth)]


def _key(category: str, image: str, question: str) -> Hashable:
    plain = " ".join(question.replace(SHORT, "").replace(YES_OR_NO, "").split())
    return category, Path(image).stem, plain


def answer_key(row: Row, place: str) -> Hashable:
    """Take category and picture from LLaVA's id, and the question from the prompt."""
    name, prompt = text_of(row, ("question_id",), place), text_of(row, ("prompt",), place)
    return _key(name.split("/")[0], name, prompt)


def question_keys(question: BenchQuestion) -> tuple[Hashable, ...]:
    """Take category, picture and question."""
    return (_key(question.category, question.image, question.prompt),)


def line(score: TaskScore) -> str:
    """The tool's two totals, of which papers quote the first."""
    return f"MME perception {score['details']['perception']:.2f}, cognition {score['details']['cognition']:.2f}"


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """ "yes", "no" or "other"."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), OTHER)


def correct(parsed: str, truth: Truth) -> float:
    """1 if the parsed word is the truth, whatever its case."""
    return float(isinstance(truth, str) and parsed == truth.lower())


def categories(samples: Sequence[Sample]) -> list[str]:
    """The categories asked, sorted."""
    return sorted({sample.category for sample in samples})


def counts(samples: Sequence[Sample]) -> np.ndarray:
    """[right, asked, pairs right, pairs] for each category, [N, 4 * C]; a pair is counted with its first answer."""
    column = {category: index for index, category in enumerate(categories(samples))}
    pair_right = {group: all(s.correct == 1 for s in members) for group, members in by_group(samples).items()}
    table = np.zeros((len(samples), len(column), 4))
    for row, sample in enumerate(samples):
        right = pair_right.pop(sample.group, None)
        table[row, column[sample.category]] = (sample.correct, 1, bool(right), right is not None)
    return table.reshape(len(samples), -1)  # [N, 4 * C]


def value(sums: np.ndarray) -> np.ndarray:
    """Mean over categories of (acc + acc+) / 2, percent: [..., 4 * C] -> [...]."""
    table = sums.reshape(*sums.shape[:-1], -1, 4)  # [..., C, 4]
    acc, acc_plus = ratio(table[..., 0], table[..., 1]), ratio(table[..., 2], table[..., 3])  # [..., C]
    return 50 * mean_present(acc + acc_plus, table[..., 1])


def details(samples: Sequence[Sample]) -> dict[str, Any]:
    """The official numbers: acc, acc+ and their sum per category, and the totals people publish."""
    table = counts(samples).sum(axis=0).reshape(-1, 4)  # [C, 4]
    acc, acc_plus = 100 * ratio(table[:, 0], table[:, 1]), 100 * ratio(table[:, 2], table[:, 3])
    names, sums = categories(samples), [float(total) for total in acc + acc_plus]
    return {
        "perception": round(sum(sums[i] for i, name in enumerate(names) if name not in COGNITION), 4),
        "cognition": round(sum(sums[i] for i, name in enumerate(names) if name in COGNITION), 4),
        "other": sum(sample.parsed == OTHER for sample in samples),
        "categories": {
            name: {"acc": round(float(acc[i]), 4), "acc_plus": round(float(acc_plus[i]), 4), "score": round(sums[i], 4)}
            for i, name in enumerate(names)
        },
    }


def score(samples: Sequence[Sample]) -> TaskScore:
    """Mean over categories of (acc + acc+) / 2 in percent; details: the official sums."""
    return task_score(samples, VERSION, counts, value, CHANCE, details(samples))
