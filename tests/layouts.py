"""Small made-up benchmarks in the layouts that people have on disk."""

import base64
import csv
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image

from vlm.data.scenes.question import CHOOSE, SHORT

Rows = list[dict[str, Any]]


def picture(colour: str) -> bytes:
    """A JPEG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "JPEG")
    return file.getvalue()


def save_picture(path: Path, colour: str = "red") -> None:
    """Write a picture, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(colour))


def write_json(path: Path, tree: Any, lines: bool = False) -> None:
    """Write a JSON tree, or JSON lines, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, tree)) if lines else json.dumps(tree))


def gqa(root: Path) -> Rows:
    """GQA's questions1.2 beside images; one question is not balanced."""
    types = {"structural": "query"}
    tree = {
        "7": {"question": "What is it?", "imageId": "n1", "answer": "red bus", "isBalanced": True, "types": types},
        "8": {"question": "Is it?", "imageId": "n1", "answer": "yes", "isBalanced": True, "types": {"structural": "x"}},
        "9": {"question": "Left out?", "imageId": "n1", "answer": "yes", "isBalanced": False, "types": types},
    }
    write_json(root / "gqa" / "data" / "questions1.2" / "testdev_balanced_questions.json", tree)
    save_picture(root / "gqa" / "data" / "images" / "n1.jpg")
    return [{"question_id": "7", "text": "Red bus."}, {"question_id": "8", "text": "Yes"}]


def scienceqa(root: Path) -> Rows:
    """LLaVA's test file; one question has a picture."""
    turns = [{"from": "human", "value": "<image>\nContext: A. no\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]
    plain = [{"from": "human", "value": "Which?\nA. x\nB. y\nC. z"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": "1", "image": "1/image.png", "conversations": turns}, {"id": "2", "conversations": plain}]
    write_json(root / "scienceqa" / "llava_test_CQM-A.json", rows)
    save_picture(root / "scienceqa" / "images" / "test" / "1" / "image.png")
    return [{"question_id": "1", "text": "B"}, {"question_id": "2", "text": "A. x"}]


def textvqa(root: Path) -> Rows:
    """TextVQA's labels and LLaVA's prompts with OCR tokens."""
    people = ["stop"] * 6 + ["halt"] * 4
    label = {"question_id": 34602, "image_id": "0ab", "question": "what Does it say?", "answers": people}
    prompt = f"What does it say?\nReference OCR token: STOP\n{SHORT}"
    write_json(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": [label]})
    asked = {"question_id": "0ab", "image": "0ab.jpg", "text": prompt}
    write_json(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", [asked], lines=True)
    save_picture(root / "textvqa" / "train_images" / "0ab.jpg")
    return [{"question_id": "0ab", "prompt": prompt, "text": "STOP."}]


def mme(root: Path) -> Rows:
    """MME's release: one category flat, one with folders for pictures and questions."""
    flat, deep = (root / "MME" / "MME_Benchmark_release_version" / name for name in ("count", "artwork"))
    save_picture(flat / "0001.jpg")
    save_picture(deep / "images" / "a.jpg")
    (deep / "questions_answers_YN").mkdir()
    for file in (flat / "0001.txt", deep / "questions_answers_YN" / "a.txt"):
        file.write_text(f"Is it {file.stem}?  Please answer yes or no.\tYes\nIs it b? Please answer yes or no.\tNo\n")
    asked = (("count/0001.png", "0001"), ("artwork/a.jpg", "a"))
    return [
        {"question_id": name, "prompt": f"Is it {what}?\n{SHORT}", "text": text}
        for name, stem in asked
        for what, text in ((stem, "Yes"), ("b", "No"))
    ]


def mmbench(root: Path) -> Rows:
    """LLaVA's table: two questions, each under both rotations, with the pictures in it."""
    write_tsv(root / "mmbench" / "mmbench_dev_20230712.tsv", TABLES["mmbench"])
    return [{"question_id": int(row["index"]), "text": row["answer"]} for row in TABLES["mmbench"]]


def pope(root: Path) -> Rows:
    """POPE's labels and LLaVA's questions in another order."""
    asked, number = [], 0
    for setting in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a dog?", "label": "yes"},
            {"question_id": 2, "image": "COCO_1.jpg", "text": f"Is there a {setting}?", "label": "no"},
        ]
        write_json(root / "pope" / "coco" / f"coco_pope_{setting}.json", rows, lines=True)
        for row in rows:
            number += 1
            text = f"{row['text']}\n{SHORT}"
            asked.append({"question_id": number, "image": row["image"], "text": text, "category": setting})
    write_json(root / "pope" / "llava_pope_test.jsonl", asked[::-1], lines=True)
    save_picture(root / "pope" / "val2014" / "COCO_1.jpg")
    return [{"question_id": row["question_id"], "text": "Yes" if "dog" in row["text"] else "No"} for row in asked]


LLAVA = {"gqa": gqa, "scienceqa": scienceqa, "textvqa": textvqa, "mme": mme, "mmbench": mmbench, "pope": pope}
FILES = {
    "gqa": "GQA_TestDev_Balanced.tsv",
    "scienceqa": "ScienceQA_TEST.tsv",
    "textvqa": "TextVQA_VAL.tsv",
    "mme": "MME.tsv",
    "mmbench": "MMBench_DEV_EN.tsv",
    "pope": "POPE.tsv",
}


def _cell(colour: str) -> str:
    return base64.b64encode(picture(colour)).decode()


_YES = {"answer": "Yes", "category": "count", "image_path": "images/1.jpg", "image": _cell("red")}
_ROTATED = [
    {"index": "3", "question": 'Say "which"?', "hint": "two\nlines", "A": "x", "B": "y", "answer": "A"},
    {"index": "1000003", "question": 'Say "which"?', "hint": "two\nlines", "A": "y", "B": "x", "answer": "B"},
    {"index": "4", "question": "Which?", "hint": "", "A": "u", "B": "v", "answer": "B"},
    {"index": "1000004", "question": "Which?", "hint": "", "A": "v", "B": "u", "answer": "A"},
]
TABLES: dict[str, Rows] = {
    "gqa": [{"index": "7", "question": "What is it?", "answer": "red", "image": _cell("red")}],
    "scienceqa": [{"index": "5", "question": "Which?", "A": "x", "B": "y", "answer": "B", "image": _cell("blue")}],
    "textvqa": [{"index": "1", "question": "Say?", "answer": str(["stop"] * 10), "image": _cell("red")}],
    "mme": [
        {"index": "0", "question": "Is it? Please answer yes or no.", **_YES},
        {"index": "1", "question": "Is it not? Please answer yes or no.", **_YES, "answer": "No", "image": "0"},
    ],
    "mmbench": [
        {
            **row,
            "category": "ocr",
            "split": "dev",
            "image": _cell("red") if int(row["index"]) < 10 else row["index"][-1],
        }
        for row in _ROTATED
    ],
    "pope": [
        {"index": "0", "question": "A dog?", "answer": "Yes", "category": "random,popular", "image": _cell("red")},
        {"index": "1", "question": "A cat?", "answer": "No", "category": "popular,random", "image": _cell("red")},
    ],
}
PREDICTIONS = {"textvqa": ["Stop"], "gqa": ["Red"]}


def predicted(family: str, table: bool = True) -> Rows:
    """VLMEvalKit's result file: the table's columns without the picture, and right predictions."""
    rows = [{key: value for key, value in row.items() if key != "image"} for row in TABLES[family]]
    said = PREDICTIONS.get(family) or [row["answer"] for row in rows]
    return [{**row, "prediction": text} for row, text in zip(rows, said, strict=True)]


def columns(rows: Rows) -> list[str]:
    """Every column that some row has, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def write_tsv(path: Path, rows: Rows) -> None:
    """Write a table as pandas does: tabs, quotes where they are needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(rows), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_xlsx(path: Path, rows: Rows, shared: bool) -> None:
    """Write a workbook of one sheet; texts in place as openpyxl writes them, or in the shared table as Excel does."""
    names = columns(rows)
    table = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    strings = list(dict.fromkeys(text for line in table for text in line))

    def cell(column: int, number: int, text: str) -> str:
        place = f'r="{chr(65 + column)}{number}"'
        if text.isdecimal():
            return f"<c {place}><v>{text}</v></c>"
        if shared:
            return f'<c {place} t="s"><v>{strings.index(text)}</v></c>'
        return f'<c {place} t="inlineStr"><is><t>{escape(text)}</t></is></c>'

    def line(number: int, texts: Sequence[str]) -> str:
        return f'<row r="{number}">{"".join(cell(i, number, text) for i, text in enumerate(texts) if text)}</row>'

    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    body = "".join(line(number, texts) for number, texts in enumerate(table, 1))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{body}</sheetData></worksheet>")
        if shared:
            items = "".join(f"<si><r><t>{escape(text)}</t></r></si>" for text in strings)
            archive.writestr("xl/sharedStrings.xml", f"<sst {space}>{items}</sst>")


def asked_with(family: str) -> str:
    """The instruction at the end of a family's prompts."""
    return CHOOSE if family in ("scienceqa", "mmbench") else SHORT
