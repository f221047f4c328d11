"""What VLMEvalKit itself prints for its result files, without a judge model ("exact_matching").

Its numbers are published too, and they differ from the authors' (docs/benchmarks.md). Rules: vlmeval/dataset/utils/
yorn.py (POPE, MME), vqa_eval.py (GQA, TextVQA), multiple_choice.py (ScienceQA, MMBench), and process_punctuation of
vlmeval/smp/misc.py.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache

from device_bench.tasks import mmbench
from device_bench.tasks.base import Sample, by_group, percent
from device_bench.tasks.mme import COGNITION
from device_bench.tasks.textvqa import FULL_STOPS_AT_MOST, plain_words

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")


def line(family: str, samples: Sequence[Sample]) -> str:
    """The number that VLMEvalKit calls Overall (of MME: perception and reasoning)."""
    return f"VLMEvalKit {_SCORES[family](samples)}"


def punctuation(text: str) -> str:
    """VLMEvalKit's process_punctuation."""
    found = text
    crowded = _COMMA.search(text) is not None
    for mark in _MARKS:
        found = found.replace(mark, "" if crowded or f"{mark} " in text or f" {mark}" in text else " ")
    return _FULL_STOP.sub("", found, count=FULL_STOPS_AT_MOST)


def yes_or_no(answer: str) -> str:
    """The one of the words yes and no that is in an answer; "unknown" for both or neither."""
    present = {"yes", "no"} & set(punctuation(answer.lower()).split())
    return present.pop() if len(present) == 1 else "unknown"


@lru_cache(maxsize=200_000)
def _vqa(answer: str) -> str:
    return plain_words(punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def _gqa(samples: Sequence[Sample]) -> str:
    right = [sample.answer.strip().lower() == str(sample.truth).strip().lower() for sample in samples]
    return f"Overall {percent(right):.2f}"


def _textvqa(samples: Sequence[Sample]) -> str:
    credits = []
    for sample in samples:
        people = sample.truth if not isinstance(sample.truth, str) else (sample.truth,)
        matches = Counter(map(_vqa, people))[_vqa(sample.answer)]
        left_out = matches * min(1, (matches - 1) / 3) + (len(people) - matches) * min(1, matches / 3)
        credits.append(left_out / len(people))
    return f"Overall {percent(credits):.2f}"


def _choice(samples: Sequence[Sample]) -> str:
    groups = by_group(samples).values()
    right = [all(mmbench.parse(one.answer, one.options) == one.truth for one in members) for members in groups]
    return f"Overall {percent(right):.2f}"


def _pope(samples: Sequence[Sample]) -> str:
    said = [(yes_or_no(sample.answer) == "yes", sample.truth == "yes") for sample in samples]
    both = sum(yes and there for yes, there in said)
    total = sum(yes for yes, _ in said) + sum(there for _, there in said)
    return f"Overall {200 * both / total if total else 0:.2f}"


def _mme(samples: Sequence[Sample]) -> str:
    pairs: dict[str, list[list[bool]]] = defaultdict(list)
    for members in by_group(samples).values():
        right = [yes_or_no(sample.answer) == str(sample.truth).lower() for sample in members]
        pairs[members[0].category].append(right)
    scores = {
        category: percent(one for pair in found for one in pair) + percent(all(pair) for pair in found)
        for category, found in pairs.items()
    }
    reasoning = sum(score for category, score in scores.items() if category in COGNITION)
    return f"perception {sum(scores.values()) - reasoning:.2f}, reasoning {reasoning:.2f}"


_SCORES: dict[str, Callable[[Sequence[Sample]], str]] = {
    "gqa": _gqa,
    "scienceqa": _choice,
    "textvqa": _textvqa,
    "mme": _mme,
    "mmbench": _choice,
    "pope": _pope,
}
