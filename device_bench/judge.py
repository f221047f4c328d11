"""Judges one thing against its baseline: parity, speed, memory, size; each a function of two records."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from device_bench import power
from device_bench.metrics import LATENCIES, Metric
from device_bench.resampling import Z95
from vlm.config import Config

Group = Literal["accuracy", "parity", "latency", "memory", "size"]
PRESENCE: Literal["presence"] = "presence"  # the group of what is missing or invalid; it cannot be ignored
State = Literal["pass", "regression", "cannot judge"]
Tree = dict[str, Any]
# Settings of a bench on which its speed and memory depend: numbers under other ones are not compared.
SETTINGS = ("threads", "decode_tokens")
NOISE = "too few samples to tell it from noise"
MEASURE_AGAIN = "Measure the baseline anew on an idle machine, or --ignore latency"
# Standard error of a median from the median absolute deviation, for n normal values: 1.2533 * 1.4826 / sqrt(n).
_MEDIAN_ERROR = 1.2533 * 1.4826


class Allowances(Config):
    """How much worse the new run may be before it is a regression (configs/gate.yaml)."""

    max_drop: float = Field(1.0, ge=0)  # points of the average
    max_task_drop: float = Field(1.0, ge=0)  # points of each benchmark
    tasks: dict[str, float] = {}  # points of single benchmarks, instead of max_task_drop
    must_see: float = Field(5.0, gt=0)  # points of the average; a comparison that would miss such a drop is no pass
    alpha: float = Field(power.ALPHA, gt=0, lt=0.5)  # chance of an alarm where nothing got worse
    power: float = Field(power.POWER, gt=0.5, lt=1)  # chance of seeing a drop, for must_see and gate --power
    max_slowdown: float = Field(10.0, ge=0)  # percent of the medians' times
    max_memory_growth: float = Field(15.0, ge=0)  # percent of the peak RSS
    max_size_growth: float = Field(2.0, ge=0)  # percent of the artifact's bytes
    ignore: list[Group] = []  # not judged at all, and the verdict says so


@dataclass(frozen=True)
class Check:
    """One number against its baseline; of `change` negative points and positive percent are worse.

    `sees` is the smallest drop of an accuracy that the comparison would see.
    """

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
    sees: float | None = None


def parity_check(where: str, old: Tree, new: Tree) -> list[Check]:
    """A proof of parity that passed must pass again."""
    before, after = old.get("parity"), new.get("parity")
    if not before or not before.get("passed"):
        return []
    values = before.get("logits_cos"), after.get("logits_cos") if after else None
    if after is None:
        return [unknown(where, "parity", "ladder", values[0], None, "the new artifact climbed no parity ladder")]
    state: State = "pass" if after.get("passed") else "regression"
    why = "" if state == "pass" else "a rung of the parity ladder is under its bar"
    return [Check(where, "parity", "ladder", *values, None, "cosine", None, state, why)]


def size_check(where: str, old: Tree, new: Tree, allowances: Allowances) -> list[Check]:
    """Bytes of the artifact."""
    return _growth(where, "size", "bytes", old, new, allowances.max_size_growth)


def memory_check(where: str, old: Tree, new: Tree, allowances: Allowances) -> list[Check]:
    """Peak RSS, comparable between devices of one kind."""
    kinds = [side["device"].get("kind") for side in (old, new)]
    other = f"other kind of device: {kinds[0]}, now {kinds[1]}" if kinds[0] != kinds[1] else other_settings(old, new)
    if other and old.get("peak_rss_mb") is not None:
        return [unknown(where, "memory", "peak_rss_mb", old["peak_rss_mb"], new.get("peak_rss_mb"), other)]
    return _growth(where, "memory", "peak_rss_mb", old, new, allowances.max_memory_growth)


def latency_checks(where: str, old: Tree, new: Tree, allowances: Allowances) -> Iterator[Check]:
    """Medians of the latencies, on the same device and with the same settings only.

    A slowdown must also exceed the noise of both medians, and a machine that was busy with other things shows none;
    behind a baseline's from a busy machine one may hide.
    """
    devices = [(side["device"].get("name"), side["device"].get("soc")) for side in (old, new)]
    same = devices[0] == devices[1]
    other = other_settings(old, new) if same else f"other device: {_name(devices[0])}, now {_name(devices[1])}"
    for metric in LATENCIES:
        before, after = old.get(metric.name), new.get(metric.name)
        if before is None:
            continue
        values = before["p50"], after["p50"] if after else None
        if other:
            yield unknown(where, "latency", metric.name, *values, other)
        elif after is None:
            yield unknown(where, "latency", metric.name, *values, _reason(new, metric.name))
        else:
            busy = busy_while(old), busy_while(new)
            yield _latency_check(where, metric, before, after, allowances.max_slowdown, busy)


def busy_while(bench: Tree) -> str | None:
    """What the bench says of other work on the machine while it was timed, None where there was little or none."""
    return (bench.get("state") or {}).get("busy")


def other_settings(old: Tree, new: Tree) -> str:
    """Which settings differ that speed and memory depend on; "" if none does."""
    sides = [{key: (side.get("settings") or {}).get(key) for key in SETTINGS} for side in (old, new)]
    changed = [f"{key} {sides[0][key]}, now {sides[1][key]}" for key in SETTINGS if sides[0][key] != sides[1][key]]
    return f"other settings: {'; '.join(changed)}" if changed else ""


def _latency_check(
    where: str, metric: Metric, old: Tree, new: Tree, allowed: float, busy: tuple[str | None, str | None]
) -> Check:
    slow, fast = (old, new) if metric.more_is_better else (new, old)
    slowdown = 100 * (slow["p50"] / fast["p50"] - 1)
    error = math.hypot(*(_MEDIAN_ERROR * side.get("mad", 0.0) / math.sqrt(side.get("n", 1)) for side in (old, new)))
    beyond_noise = abs(new["p50"] - old["p50"]) > Z95 * error
    before, now = busy
    why = ""
    if slowdown > allowed and (now or not beyond_noise):
        why = now or NOISE
    elif slowdown <= allowed and before:
        why = f"of the baseline: {before}. {MEASURE_AGAIN}"
    state: State = "cannot judge" if why else "regression" if slowdown > allowed else "pass"
    return Check(
        where, "latency", metric.name, old["p50"], new["p50"], round(slowdown, 1), "% slower", allowed, state, why
    )


def _growth(where: str, group: Group, metric: str, old: Tree, new: Tree, allowed: float) -> list[Check]:
    before, after = old.get(metric), new.get(metric)
    if not before:
        return []
    if after is None:
        return [unknown(where, group, metric, before, None, _reason(new, metric))]
    growth = 100 * (after / before - 1)
    state: State = "pass" if growth <= allowed else "regression"
    return [Check(where, group, metric, before, after, round(growth, 1), "% larger", allowed, state)]


def unknown(where: str, group: Group, metric: str, old: float | None, new: float | None, why: str) -> Check:
    """A check that cannot be judged, and why."""
    return Check(where, group, metric, old, new, None, "", None, "cannot judge", why)


def _reason(record: Tree, metric: str) -> str:
    return str((record.get("reasons") or {}).get(metric) or "not measured in the new run")


def _name(device: tuple[str | None, str | None]) -> str:
    return " / ".join(part or "unknown" for part in device)
