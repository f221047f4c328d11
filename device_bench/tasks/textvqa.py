"""TextVQA: soft accuracy against ten human answers.

Rules: the M4C evaluator (facebookresearch/mmf, copied by LLaVA and MobileVLM as m4c_evaluator.py), which is VQA's
answer processor as EvalAI runs it: lower case; commas and question marks out; a possessive 's apart; other
punctuation out where a space is beside it and a space otherwise; full stops out unless a digit follows, the first 32
of them (the original passes re.UNICODE = 32 where `count` stands); number words to ten into digits; articles out;
apostrophes into contractions. An answer given by m of ten people earns the mean over the ten leave-one-out sets of
min(1, matches / 3): 0.3, 0.6, 0.9, 1 for m = 1, 2, 3, 4, not m / 3. LLaVA-1.5 and MobileVLM V2 both publish TextVQA
with OCR tokens in the prompt (llava_textvqa_val_v051_ocr.jsonl).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache

from device_bench.tasks.base import Sample, TaskScore, Truth, accuracy, credit_by, credit_counts, task_score

VERSION = "textvqa-1"
counts, value = credit_counts, accuracy
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_DIGITS.split())}
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_AT_MOST = 32
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
    stripped = _FULL_STOP.sub("", stripped, count=_FULL_STOPS_AT_MOST)
    words = (_NUMBERS.get(word, word) for word in stripped.lower().split())
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
