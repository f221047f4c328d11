"""Judges accuracies against a baseline: paired where the answers are known, a report's checks corrected together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from device_bench.credits import unpack
from device_bench.evaluate import load_answers
from device_bench.judge import NOISE, Allowances, Check, State, Tree, unknown
from device_bench.power import smallest_drop
from device_bench.resampling import Z95
from device_bench.stats import Difference, holm, normal_p_drop, paired_difference
from device_bench.tasks.base import Sample
from vlm.errors import UserError

AVERAGE = "average"
SETTING = "max_new_tokens"  # the setting of a bench that changes answers


@dataclass(frozen=True)
class Entry:
    """Something with an accuracy (a bench, a model) in a report that lies in `folder`."""

    record: Tree
    folder: Path | None

    def answers(self) -> list[Sample] | None:
        """The answers if their file is there: relative to the report's folder or, in run folders, to the one above."""
        name = self.record.get("answers")
        if not name or self.folder is None:
            return None
        places = [self.folder / name, self.folder.parent / name]
        path = next((place for place in places if place.is_file()), None)
        return load_answers(path) if path else None


@dataclass(frozen=True)
class Flip:
    """A question on whose answer baseline and new run earn different credit."""

    where: str
    family: str
    id: str
    image: str
    prompt: str
    truth: str
    before: str
    after: str
    points: float


@dataclass(frozen=True)
class Compared:
    """Two accuracies: differences by name ("avg" and each benchmark), how they were found, and the flipped answers."""

    where: str
    before: Tree
    after: Tree
    found: dict[str, Difference]
    how: str
    flips: list[Flip]


def compare(where: str, old: Entry, new: Entry) -> Compared | Check | None:
    """Compare two accuracies; a check where they cannot be compared, None where the baseline has none.

    Paired by question where both runs' answers are known (their files, or the credits that a baseline in git keeps),
    else by the intervals in the reports, as if the two runs had been asked different questions, which sees less.
    """
    before, after = old.record.get("accuracy"), new.record.get("accuracy")
    if before is None:
        return None
    if after is None:
        why = str((new.record.get("reasons") or {}).get("accuracy", "the new run has no accuracy"))
        return unknown(where, "accuracy", AVERAGE, before["avg"]["score"], None, why)
    if other := _other_data(before, after) or _other_setting(old.record, new.record):
        return unknown(where, "accuracy", AVERAGE, before["avg"]["score"], after["avg"]["score"], other)
    try:
        pair = _answers(old, new)
        if pair is not None:
            return Compared(where, before, after, paired_difference(*pair), "paired", flips(where, *pair))
    except UserError as error:
        return unknown(where, "accuracy", AVERAGE, before["avg"]["score"], after["avg"]["score"], str(error))
    names = ("avg", *before["tasks"])
    found = {name: _unpaired(score_of(before, name), score_of(after, name)) for name in names}
    return Compared(where, before, after, found, "by intervals", [])


def accuracy_checks(comparisons: Sequence[Compared], allowances: Allowances) -> list[Check]:
    """Judge the averages and the benchmarks of everything that was compared.

    A regression is a drop of more than the allowance that is also beyond the noise: a one-sided test at `alpha`, the
    averages of a report corrected together and its benchmarks together (Holm), each at half of `alpha` where they are
    not the same. Else what lost no more than its allowance even at the lower bound of its interval is a pass. Else an
    average cannot be judged that dropped by more than its allowance or of which a drop of `must_see` points would be
    missed, and a benchmark of which both is true.
    """
    averages = {(each.where, "avg"): each.found["avg"]["p_drop"] for each in comparisons}
    tasks = {
        (each.where, name): item["p_drop"] for each in comparisons for name, item in each.found.items() if name != "avg"
    }
    looks = 1 if len(tasks) == len(averages) else 2
    corrected = {key: looks * p for group in (averages, tasks) for key, p in holm(group).items()}
    checks = []
    for each in comparisons:
        for name, item in each.found.items():
            alpha = allowances.alpha / looks / len(averages if name == "avg" else tasks)
            checks.append(_check(each, name, item, corrected[each.where, name], alpha, allowances))
    return checks


def _check(each: Compared, name: str, item: Difference, p: float, alpha: float, allowances: Allowances) -> Check:
    default = allowances.max_drop if name == "avg" else allowances.max_task_drop
    allowed, points, (low, high) = allowances.tasks.get(name, default), item["points"], item["ci95"]
    sees = smallest_drop(item["error"], alpha, allowances.power)
    lowest = points - NormalDist().inv_cdf(1 - alpha) * item["error"]
    beyond, blind = points < -allowed, sees > allowances.must_see and lowest < -allowed
    state: State = "pass"
    why = f"{each.how}, 95 % {low:+.1f} to {high:+.1f}"
    if beyond and p < allowances.alpha:
        state = "regression"
    elif (beyond or blind) if name == "avg" else (beyond and blind):
        state = "cannot judge"
        why += f"; {NOISE}" + (f": only drops of {sees:.1f} points or more are seen" if blind else "")
    elif beyond:
        why += "; within the noise"
    old, new = score_of(each.before, name)["score"], score_of(each.after, name)["score"]
    label, change = AVERAGE if name == "avg" else name, round(points, 2)
    return Check(each.where, "accuracy", label, old, new, change, "points", allowed, state, why, round(sees, 2))


def flips(where: str, before: Sequence[Sample], after: Sequence[Sample]) -> list[Flip]:
    """Questions whose credit changed, lost ones first; `before` may lack the answers' texts."""
    known = {(sample.family, sample.id): sample for sample in before}
    found = []
    for sample in after:
        old = known[sample.family, sample.id]
        if old.correct != sample.correct:
            truth = sample.truth if isinstance(sample.truth, str) else max(sample.truth, key=sample.truth.count)
            said = old.answer or ("right" if old.correct == 1 else f"{old.correct:g} of 1")
            asked = sample.family, sample.id, sample.image, sample.prompt, truth
            found.append(Flip(where, *asked, said, sample.answer, round(sample.correct - old.correct, 2)))
    return sorted(found, key=lambda flip: (flip.points, flip.family, flip.id))


def _answers(old: Entry, new: Entry) -> tuple[list[Sample], list[Sample]] | None:
    after = new.answers()
    if after is None:
        return None
    before = old.answers()
    if before is None and (packed := old.record.get("credits")):
        before = unpack(packed, after)
    return None if before is None else (before, after)


def score_of(accuracy: Tree, name: str) -> Tree:
    """The score of a benchmark, or of "avg"."""
    found: Tree = accuracy["avg"] if name == "avg" else accuracy["tasks"][name]
    return found


def _other_data(before: Tree, after: Tree) -> str:
    """Why two accuracies were not measured on the same questions by the same rules; "" if they were."""
    old, new = before["tasks"], after["tasks"]
    if old.keys() != new.keys():
        return f"other benchmarks: {', '.join(sorted(old))} before, {', '.join(sorted(new))} now"
    for name in old:
        for key in ("version", "n"):
            if old[name].get(key) != new[name].get(key):
                return f"{name}: {key} was {old[name].get(key)}, is {new[name].get(key)}"
        versions = [side[name].get("details", {}).get("data") for side in (old, new)]
        if versions[0] != versions[1]:
            return f"{name}: other data version: {versions[0]} before, {versions[1]} now"
    return ""


def _other_setting(old: Tree, new: Tree) -> str:
    values = [(side.get("settings") or {}).get(SETTING) for side in (old, new)]
    differ = None not in values and values[0] != values[1]
    return f"other settings: {SETTING} {values[0]} before, {values[1]} now" if differ else ""


def _unpaired(old: Tree, new: Tree) -> Difference:
    """Difference in points from two intervals, taken as independent and normal."""
    points = new["score"] - old["score"]
    half = math.hypot(*((side["ci95"][1] - side["ci95"][0]) / 2 for side in (old, new)))
    error = half / Z95
    p_drop = normal_p_drop(points, error)
    return {
        "points": points,
        "ci95": [points - half, points + half],
        "p": min(1.0, 2 * min(p_drop, 1 - p_drop)),
        "p_drop": p_drop,
        "error": error,
        "test": "intervals",
        "n": new["n"],
    }
