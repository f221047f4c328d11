"""Times the scoring of all six benchmarks' full answer files on one core: `python -m benchmarks.scoring`.

The files are made up, as large as the real ones and in LLaVA's layout (MMBench in VLMEvalKit's); reading, grading,
scores and intervals are all in the time.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from device_bench.predictions import score_predictions
from device_bench.tasks.mme import COGNITION, PERCEPTION
from vlm.data.scenes.question import SHORT

BAR_S = 20.0
WORDS = ("yes", "no", "red", "two", "left", "stop sign", "St. 3.5", "don't", "a dog", "the man")
MME_PAIRS = {
    "artwork": 200,
    "landmark": 200,
    "scene": 200,
    "celebrity": 170,
    "posters": 147,
    "commonsense_reasoning": 70,
}
Rows = list[dict[str, Any]]


def _lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tree(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def gqa(root: Path, draw: random.Random) -> Rows:
    """12,578 questions about 398 pictures."""
    asked = {
        str(n): {"question": "What?", "imageId": f"n{n % 398}", "answer": draw.choice(WORDS), "isBalanced": True}
        for n in range(12578)
    }
    _tree(root / "testdev_balanced_questions.json", asked)
    return [{"question_id": name, "text": draw.choice(WORDS)} for name in asked]


def scienceqa(root: Path, draw: random.Random) -> Rows:
    """4,241 questions, 2,017 with a picture."""
    rows = []
    for n in range(4241):
        human = f"Context: {'words ' * 60}\nWhich?\nA. x\nB. y\nC. z"
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": draw.choice("ABC")}]
        rows.append({"id": str(n), "conversations": turns, **({"image": f"{n}/image.png"} if n < 2017 else {})})
    _tree(root / "llava_test_CQM-A.json", rows)
    return [{"question_id": row["id"], "text": draw.choice("ABC")} for row in rows]


def textvqa(root: Path, draw: random.Random) -> Rows:
    """5,000 questions with ten answers each about 3,166 pictures."""
    rows = []
    for n in range(5000):
        people = [draw.choice(WORDS) + draw.choice(("", " x", "!")) for _ in range(10)]
        rows.append({"question_id": n, "image_id": f"{n % 3166:x}", "question": f"What {n}?", "answers": people})
    _tree(root / "TextVQA_0.5.1_val.json", {"data": rows})
    return [
        {"question_id": row["image_id"], "prompt": f"{row['question']}\n{SHORT}", "text": draw.choice(WORDS)}
        for row in rows
    ]


def mme(root: Path, draw: random.Random) -> Rows:
    """2,374 questions in 14 categories."""
    answers = []
    for category in (*PERCEPTION, *COGNITION):
        (root / category).mkdir(parents=True)
        few = 20 if category in (*COGNITION, "OCR") else 30
        for n in range(MME_PAIRS.get(category, few)):
            (root / category / f"{n}.txt").write_text(f"Is it? Please answer yes or no.\tYes\nIs it {n}?\tNo\n")
            for asked in ("Is it?", f"Is it {n}?"):
                row = {"question_id": f"{category}/{n}.jpg", "prompt": f"{asked}\n{SHORT}"}
                answers.append({**row, "text": draw.choice(("Yes", "No", "Unsure"))})
    return answers


def mmbench(root: Path, draw: random.Random) -> Rows:
    """1,094 questions under four rotations."""
    options = {"A": "a red bus", "B": "a blue car", "C": "two dogs", "D": "none"}
    return [
        {
            **{"index": rotation * 1_000_000 + n, "question": "Which?", **options, "answer": draw.choice("ABCD")},
            **{"category": f"c{n % 20}", "prediction": draw.choice(("A", "B.", "The answer is C", "two dogs"))},
        }
        for rotation in range(4)
        for n in range(1094)
    ]


def pope(root: Path, draw: random.Random) -> Rows:
    """8,910 questions about 500 pictures in three settings."""
    asked: Rows = []
    for setting, count in (("random", 2910), ("popular", 3000), ("adversarial", 3000)):
        rows = [
            {"question_id": n, "image": f"{n % 500}.jpg", "text": f"A {n}?", "label": draw.choice(("yes", "no"))}
            for n in range(count)
        ]
        _lines(root / f"coco_pope_{setting}.json", rows)
        for row in rows:
            where = {"question_id": len(asked) + 1, "image": row["image"], "category": setting}
            asked.append({**where, "text": f"{row['text']}\n{SHORT}"})
    _lines(root / "llava_pope_test.jsonl", asked)
    return [{"question_id": row["question_id"], "text": draw.choice(("Yes", "No"))} for row in asked]


MAKERS: dict[str, Callable[[Path, random.Random], Rows]] = {
    "gqa": gqa,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "mme": mme,
    "mmbench": mmbench,
    "pope": pope,
}


def main() -> None:
    """Print the seconds of each benchmark; exit 1 where all six take longer than the bar."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, make in MAKERS.items():
            root = Path(folder) / name
            root.mkdir()
            answers = root / "answers.jsonl"
            _lines(answers, make(root, random.Random(name)))
            start = time.perf_counter()
            accuracy, samples = score_predictions(answers, name, None if name == "mmbench" else root)
            seconds = time.perf_counter() - start
            line = accuracy["tasks"][name]["details"]["line"]
            print(f"{name:<10} {len(samples):>6} answers  {seconds:6.2f} s  {line}")
            total += seconds
    print(f"all six: {total:.1f} s on one core; the bar is {BAR_S:g} s")
    sys.exit(total > BAR_S)


if __name__ == "__main__":
    main()
