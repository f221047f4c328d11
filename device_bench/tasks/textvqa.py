"""TextVQA: soft accuracy against ten human answers.

Rules: the M4C evaluator (facebookresearch/mmf, copied by LLaVA and MobileVLM as m4c_evaluator.py), which is VQA's
answer processor as EvalAI runs it: lower case; commas and question marks out; a possessive 's apart; other
punctuation out where a space is beside it and a space otherwise; full stops out unless a digit follows, the first 32
of them (the original passes re.UNICODE = 32 where `count` stands); number words to ten into digits; articles out;
apostrophes into contractions. An answer given by m of ten people earns the mean over the ten leave-one-out sets of
min(1, matches / 3): 0.3, 0.6, 0.9, 1 for m = 1, 2, 3, 4, not m / 3. LLaVA-1.5 and MobileVLM V2 both publish TextVQA
with OCR tokens in the prompt (llava_textvqa_val_v051_ocr.jsonl).
"""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from device_bench.pictures import picture_folder, table_rows
from device_bench.rows import Row, find, id_of, need, read_json, read_rows, text_of
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
from vlm.errors import UserError

VERSION = "textvqa-1"
LABELS = ("TextVQA_0.5.1_val.json",)
PROMPTS = ("llava_textvqa_val_v051_ocr.jsonl",)
TABLES = ("TextVQA_VAL.tsv",)
EDITIONS: Editions = {(5000,): "validation split of TextVQA 0.5.1"}
OCR = "Reference OCR token:"
counts, value = credit_counts, accuracy
_OLD_OCR = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def load(data: Path) -> list[BenchQuestion]:
    """Read TextVQA_0.5.1_val.json, with LLaVA's prompts (OCR tokens in them) if they are there, or VLMEvalKit's table.

    Pictures: train_images/<image id>.jpg (or train_val_images/train_images) beside the questions.
    """
    path = find(data, LABELS)
    if path is None:
        table = need(data, (*LABELS, *TABLES), "TextVQA's questions")
        return [question for row, image in table_rows(table) for question in from_row(row, image)]
    asked = find(data, PROMPTS)
    prompts = {_key(str(row["question_id"]), row["text"]): row["text"] for row in read_rows(asked)} if asked else {}
    rows = read_json(path)["data"]
    names = [f"{row['image_id']}.jpg" for row in rows]
    places = [base / "train_images" for base in (path.parent, path.parent / "train_val_images", path.parent.parent)]
    folder = picture_folder([*places, path.parent / "images"], names)
    return [
        BenchQuestion(
            str(row["question_id"]),
            str(folder / name),
            "textvqa",
            "val",
            "",
            str(row["question_id"]),
            prompts.get((str(row["image_id"]), row["question"].lower()), short_prompt(row["question"])),
            tuple(str(answer) for answer in row["answers"]),
        )
        for row, name in zip(rows, names, strict=True)
    ]


def version(questions: Sequence[BenchQuestion]) -> dict[str, Any]:
    """Name the edition by its counts."""
    return edition(questions, EDITIONS, ocr_in_prompt=any(OCR in question.prompt for question in questions))


def from_row(row: Row, image: str) -> list[BenchQuestion]:
    """Read index, question and answer, a list of ten written as in Python."""
    name, place = str(row["index"]), f"TextVQA's question {row['index']}"
    try:
        truth = tuple(str(answer) for answer in ast.literal_eval(text_of(row, ("answer",), place)))
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(f"{place}: `answer` is no list of answers ({error}). Download the table again.") from error
    prompt = short_prompt(text_of(row, ("question",), place))
    return [BenchQuestion(name, image or name, "textvqa", "val", "", name, prompt, truth)]


def _key(image: str, prompt: str) -> tuple[str, str]:
    """Image and question, the question read out of a prompt as LLaVA's eval_textvqa.py does."""
    lines = prompt.split("\n")
    if old := _OLD_OCR.search(prompt) if prompt.startswith("OCR tokens: ") else None:
        return image, old[1].lower()
    return image, lines[prompt.startswith(OCR) and len(lines) > 1].lower()


def answer_key(row: Row, place: str) -> Hashable:
    """Take LLaVA's image id and the question in its prompt, else the id."""
    if "prompt" in row:
        return _key(text_of(row, ("question_id",), place), str(row["prompt"]))
    return id_of(row, ("question_id", "index"), place)


def question_keys(question: BenchQuestion) -> tuple[Hashable, ...]:
    """Take image or id with the question, or the id alone."""
    by_image, by_id = (_key(name, question.prompt) for name in (Path(question.image).stem, question.id))
    return by_image, by_id, question.id


def line(score: TaskScore) -> str:
    """What eval_textvqa.py prints."""
    return f"TextVQA accuracy {score['score']:.2f}"


_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_DIGITS.split())}
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOPS_AT_MOST = 32
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Each contraction by every spelling that lacks one of its apostrophes, as the original table has them."""
    table = {"somebody'd": "somebodyd"}  # the one entry of the original that takes an apostrophe away
    for word in _CONTRACTED.split():
        for place, letter in enumerate(word):
            if letter == "'":
                table[word[:place] + word[place + 1 :]] = word
    return table


_CONTRACTIONS = _contractions()


@lru_cache(maxsize=200_000)
def normalise(text: str) -> str:
    """The answer processor described above."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    for mark in _PUNCTUATION:
        if mark in text:
            beside_space = f"{mark} " in text or f" {mark}" in text
            stripped = stripped.replace(mark, "" if beside_space else " ")
    return plain_words(_FULL_STOP.sub("", stripped, count=FULL_STOPS_AT_MOST))


def plain_words(text: str) -> str:
    """The end of VQA's answer processor: number words into digits, articles out, apostrophes into contractions."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """The normalised answer."""
    return normalise(answer)


@lru_cache(maxsize=100_000)
def credits(answers: tuple[str, ...]) -> dict[str, float]:
    """Credit of each different human answer, normalised: min(1, matches / 3) averaged over the leave-one-out sets."""
    people = len(answers)
    given = Counter(normalise(answer) for answer in answers)
    return {a: (m * min(1, (m - 1) / 3) + (people - m) * min(1, m / 3)) / people for a, m in given.items()}


def correct(parsed: str, truth: Truth) -> float:
    """Credit from 0 to 1; a single truth (the built-in scenes) stands for ten people who agree."""
    if isinstance(truth, str):
        return float(parsed == normalise(truth))
    return credits(truth).get(parsed, 0.0)


def chance(samples: Sequence[Sample]) -> float:
    """Percent of always giving the one answer that earns most."""
    earned: dict[str, float] = defaultdict(float)
    for sample in samples:
        truth = sample.truth
        for answer, credit in ({normalise(truth): 1.0} if isinstance(truth, str) else credits(truth)).items():
            earned[answer] += credit
    return 100 * max(earned.values()) / len(samples)


def score(samples: Sequence[Sample]) -> TaskScore:
    """Soft accuracy in percent; details: accuracy per kind."""
    details = {"kinds": credit_by(samples, lambda sample: sample.kind)}
    return task_score(samples, VERSION, counts, value, chance(samples), details)
