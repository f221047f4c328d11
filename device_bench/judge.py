"""Judges one thing against its baseline: accuracy, parity, speed, memory, size; each a function of two records."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from device_bench.evaluate import load_answers
from device_bench.metrics import LATENCIES, Metric
from device_bench.resampling import Z95
from device_bench.stats import holm, paired_difference
from vlm.config import Config

Group = Literal["accuracy", "parity", "latency", "memory", "size"]
PRESENCE: Literal["presence"] = "presence"  # the group of what is missing or invalid; it cannot be ignored
State = Literal["pass", "regression", "cannot judge"]
Tree = dict[str, Any]
ALPHA = 0.05
NOISE = "too few samples to tell it from noise"
# Standard error of a median from the median absolute deviation, for n normal values: 1.2533 * 1.4826 / sqrt(n).
_MEDIAN_ERROR = 1.2533 * 1.4826


class Allowances(Config):
    """How much worse the new run may be before it is a regression (configs/gate.yaml)."""

    max_drop: float = Field(1.0, ge=0)  # points of the average
    max_task_drop: float = Field(2.0, ge=0)  # points of each benchmark
    tasks: dict[str, float] = {}  # points of single benchmarks, instead of max_task_drop
    max_slowdown: float = Field(10.0, ge=0)  # percent of the medians' times
    max_memory_growth: float = Field(15.0, ge=0)  # percent of the peak RSS
    max_size_growth: float = Field(2.0, ge=0)  # percent of the artifact's bytes
    ignore: list[Group] = []  # not judged at all, and the verdict says so


@dataclass(frozen=True)
class Check:
    """One number against its baseline; of `change` negative points and positive percent are worse."""

    where: str
    group: Group | Literal["presence"]
    metric: str
    baseline: float | None
    new: float | None
    change: float | None
    unit: str
    allowed: float | None
    state: State
    why: str = ""


@dataclass(frozen=True)
class Entry:
    """Something with an accuracy (a bench, a model) in a report that lies in `folder`."""

    record: Tree
    folder: Path | None

    def answers(self) -> Path | None:
        """The answers file if it is there: relative to the report's folder or, as in run folders, to the one above."""
        name = self.record.get("answers")
        if not name or self.folder is None:
            return None
        places = [self.folder / name, self.folder.parent / name]
        return next((path for path in places if path.is_file()), None)


def accuracy_checks(where: str, old: Entry, new: Entry, allowances: Allowances) -> list[Check]:
    """Judge the average and each benchmark.

    Paired by question where both answer files can be read (bootstrap over images, McNemar), else by the intervals in
    the reports, as if the two runs had been asked different questions, which sees less. A regression is a drop of more
    than the allowance that is also beyond the noise (two-sided 5 %, benchmarks corrected together by Holm); a drop of
    more than the allowance within the noise cannot be judged.
    """
    before, after = old.record.get("accuracy"), new.record.get("accuracy")
    if before is None:
        return []
    if after is None:
        why = str((new.record.get("reasons") or {}).get("accuracy", "the new run has no accuracy"))
        return [_unknown(where, "accuracy", "average", before["avg"]["score"], None, why)]
    if other := _other_data(before, after):
        return [_unknown(where, "accuracy", "average", before["avg"]["score"], after["avg"]["score"], other)]
    found, how = _differences(before, after, old.answers(), new.answers())
    adjusted = holm({name: p for name, (_, _, p) in found.items() if name != "avg"})
    checks = []
    for name, (points, (low, high), p) in found.items():
        default = allowances.max_drop if name == "avg" else allowances.max_task_drop
        allowed = allowances.tasks.get(name, default)
        sure = adjusted.get(name, p) < ALPHA
        state: State = "pass" if points >= -allowed else "regression" if sure else "cannot judge"
        why = f"{how}, 95 % {low:+.1f} to {high:+.1f}" + (f"; {NOISE}" if state == "cannot judge" else "")
        label, values = "average" if name == "avg" else name, (_score(before, name), _score(after, name))
        scores = values[0]["score"], values[1]["score"]
        checks.append(Check(where, "accuracy", label, *scores, round(points, 2), "points", allowed, state, why))
    return checks


Found = tuple[float, Sequence[float], float]  # points, 95 % interval, two-sided p


def _differences(before: Tree, after: Tree, old: Path | None, new: Path | None) -> tuple[dict[str, Found], str]:
    """The difference of the average and each benchmark, and how it was found."""
    if old and new:
        paired = paired_difference(load_answers(old), load_answers(new))
        return {name: (item["points"], item["ci95"], item["p"]) for name, item in paired.items()}, "paired"
    names = ("avg", *before["tasks"])
    return {name: _unpaired(_score(before, name), _score(after, name)) for name in names}, "by intervals"


def _score(accuracy: Tree, name: str) -> Tree:
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


def _unpaired(old: Tree, new: Tree) -> Found:
    """Difference in points, its 95 % interval and two-sided p from two intervals, taken as independent and normal."""
    points = new["score"] - old["score"]
    half = math.hypot(*((side["ci95"][1] - side["ci95"][0]) / 2 for side in (old, new)))
    p = math.erfc(abs(points) / half * Z95 / math.sqrt(2)) if half > 0 else float(points == 0)
    return points, (points - half, points + half), p


def parity_check(where: str, old: Tree, new: Tree) -> list[Check]:
    """A proof of parity that passed must pass again."""
    before, after = old.get("parity"), new.get("parity")
    if not before or not before.get("passed"):
        return []
    values = before.get("logits_cos"), after.get("logits_cos") if after else None
    if after is None:
        return [_unknown(where, "parity", "ladder", values[0], None, "the new artifact climbed no parity ladder")]
    state: State = "pass" if after.get("passed") else "regression"
    why = "" if state == "pass" else "a rung of the parity ladder is under its bar"
    return [Check(where, "parity", "ladder", *values, None, "cosine", None, state, why)]


def size_check(where: str, old: Tree, new: Tree, allowances: Allowances) -> list[Check]:
    """Bytes of the artifact."""
    return _growth(where, "size", "bytes", old, new, allowances.max_size_growth)


def memory_check(where: str, old: Tree, new: Tree, allowances: Allowances) -> list[Check]:
    """Peak RSS, comparable between devices of one kind."""
    kinds = [side["device"].get("kind") for side in (old, new)]
    if kinds[0] != kinds[1] and old.get("peak_rss_mb") is not None:
        values = old["peak_rss_mb"], new.get("peak_rss_mb")
        return [_unknown(where, "memory", "peak_rss_mb", *values, f"other kind of device: {kinds[0]}, now {kinds[1]}")]
    return _growth(where, "memory", "peak_rss_mb", old, new, allowances.max_memory_growth)


def latency_checks(where: str, old: Tree, new: Tree, allowances: Allowances) -> Iterator[Check]:
    """Medians of the latencies, on the same device only; a slowdown must also exceed the noise of both medians."""
    devices = [(side["device"].get("name"), side["device"].get("soc")) for side in (old, new)]
    for metric in LATENCIES:
        before, after = old.get(metric.name), new.get(metric.name)
        if before is None:
            continue
        values = before["p50"], after["p50"] if after else None
        if devices[0] != devices[1]:
            yield _unknown(
                where, "latency", metric.name, *values, f"other device: {_name(devices[0])}, now {_name(devices[1])}"
            )
        elif after is None:
            yield _unknown(where, "latency", metric.name, *values, _reason(new, metric.name))
        else:
            yield _latency_check(where, metric, before, after, allowances.max_slowdown)


def _latency_check(where: str, metric: Metric, old: Tree, new: Tree, allowed: float) -> Check:
    slow, fast = (old, new) if metric.more_is_better else (new, old)
    slowdown = 100 * (slow["p50"] / fast["p50"] - 1)
    error = math.hypot(*(_MEDIAN_ERROR * side["mad"] / math.sqrt(side["n"]) for side in (old, new)))
    beyond_noise = abs(new["p50"] - old["p50"]) > Z95 * error
    state: State = "pass" if slowdown <= allowed else "regression" if beyond_noise else "cannot judge"
    why = NOISE if state == "cannot judge" else ""
    return Check(
        where, "latency", metric.name, old["p50"], new["p50"], round(slowdown, 1), "% slower", allowed, state, why
    )


def _growth(where: str, group: Group, metric: str, old: Tree, new: Tree, allowed: float) -> list[Check]:
    before, after = old.get(metric), new.get(metric)
    if not before:
        return []
    if after is None:
        return [_unknown(where, group, metric, before, None, _reason(new, metric))]
    growth = 100 * (after / before - 1)
    state: State = "pass" if growth <= allowed else "regression"
    return [Check(where, group, metric, before, after, round(growth, 1), "% larger", allowed, state)]


def _unknown(where: str, group: Group, metric: str, old: float | None, new: float | None, why: str) -> Check:
    return Check(where, group, metric, old, new, None, "", None, "cannot judge", why)


def _reason(record: Tree, metric: str) -> str:
    return str((record.get("reasons") or {}).get(metric) or "not measured in the new run")


def _name(device: tuple[str | None, str | None]) -> str:
    return " / ".join(part or "unknown" for part in device)
