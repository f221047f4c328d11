"""study.md, from study.json alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from device_bench.stats import widest

Tree = dict[str, Any]
INTERVALS = ("95 % (seeds and images)", "95 % t (seeds)")
COLUMNS = ("row", "average", "against", "difference", *INTERVALS, "seeds better", "p", "steps", "min", "time")
EQUAL = {"steps": "Equal steps", "time": "Equal time of training"}


def markdown(result: Tree) -> str:
    """Say what a study found: how it was made, then `tables`."""
    return "\n".join([f"# Study {result['config']['name']}", "", *_about(result), "", tables(result, "##", "")])


def tables(result: Tree, heading: str, figures: str) -> str:
    """Per comparison the rows with their paired intervals, the families, what went wrong; then the learning rates.

    Args:
        result: study.json.
        heading: level of the headings, "##".
        figures: what the figures' file names begin with.
    """
    lines = []
    for equal, rows in result["comparisons"].items():
        lines += [f"{heading} {EQUAL[equal]}", "", *_averages(rows), "", *_families(rows), "", *_notes(rows)]
        lines += _pairs(result["pairs"][equal])
        if any(row["at"] for row in rows):
            lines += [f"![Gains along what was varied]({figures}gains-{equal}.svg)", ""]
        lines += [f"![Cross-entropy while training]({figures}curves-{equal}.svg)", ""]
    if result["tuning"]:
        lines += [f"{heading} Learning rates", "", *_tuning(result["tuning"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _about(result: Tree) -> list[str]:
    config, readings = result["config"], result["readings"]
    lines = [
        f"Split: {result['split']}. Seeds: {', '.join(map(str, config['seeds']))}. Base: `{config['base']}`. Rows of a "
        "seed start from the same weights and see the same batches.",
        "",
        "Intervals are paired, 95 %: a bootstrap that draws seeds and images, and Student's t over seeds alone. p is "
        "the bootstrap's, adjusted for the number of rows (Holm). min is the time of one training, on the "
        f"{'wall' if config['clock'] == 'wall' else 'processors'}, time its share of that of the row it is against; "
        f"{cost([result['spent']])} Where one interval is given, it is the wider of the two.",
    ]
    if len(readings) > 1:
        forced = sum(reading["forced"] for reading in readings)
        lines += [
            "",
            f"The test split was read {len(readings)} times, {forced} of them by a changed study. Scores that were "
            "seen before a change are no longer independent of it.",
        ]
    return lines


def cost(spent: Sequence[Tree]) -> str:
    """What studies took together, in a sentence."""
    training, evaluating = (sum(entry[key] for entry in spent) / 3600 for key in ("seconds", "evaluating_seconds"))
    trainings, machines = sum(entry["trainings"] for entry in spent), {entry["processor"]: None for entry in spent}
    return (
        f"{trainings} trainings took {training:.1f} hours of one core and their evaluations {evaluating:.1f} "
        f"({'; '.join(machines)})."
    )


def _averages(rows: Sequence[Tree]) -> list[str]:
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"|---|---:|---|{'---:|' * (len(COLUMNS) - 3)}",
    ]
    by_name = {row["row"]: row for row in rows}
    for row in rows:
        seeds = row["seeds"]
        if not seeds:
            lines.append(f"| {row['row']} | failed |{' |' * (len(COLUMNS) - 2)}")
            continue
        spread = f" ± {row['std']:.1f}" if row["std"] is not None else ""
        minutes, share = _minutes(row), _minutes(row) / (_minutes(by_name[row["against"]]) or 1.0)
        steps = round(sum(seed["steps"] for seed in seeds) / len(seeds))
        score = f"{row['mean']['avg']:.1f}{spread}"
        lines.append(f"| {row['row']} | {score} | {_difference(row)} | {steps} | {minutes:.1f} | {share:.0%} |")
    return lines


def _minutes(row: Tree) -> float:
    """Mean time of a row's trainings; 0 if none ended well."""
    return sum(seed["seconds"] for seed in row["seeds"]) / max(1, len(row["seeds"])) / 60


def _difference(row: Tree) -> str:
    if not row["difference"]:
        return " | | | | | "
    found = row["difference"]["avg"]
    better = f"{sum(points > 0 for points in found['seeds'])} of {len(found['seeds'])}"
    t = interval(found["t_ci95"]) if found["t_ci95"] else "needs two seeds"
    parts = [row["against"], f"{found['points']:+.1f}", interval(found["ci95"]), t, better, f"{row['p_holm']:.3f}"]
    return " | ".join(parts)


def _pairs(pairs: Sequence[Tree]) -> list[str]:
    lines = []
    for pair in pairs:
        if found := pair["difference"]:
            points, ends = found["avg"]["points"], interval(widest(found["avg"]))
            lines.append(f"* {pair['row']} against {pair['against']}: {points:+.1f} points ({ends}).")
    return [*lines, ""] if lines else []


def _families(rows: Sequence[Tree]) -> list[str]:
    """Scores of the rows that others are against, differences with their interval of all others."""
    names = [name for row in rows for name in row["mean"] if name != "avg"]
    names = list(dict.fromkeys(names))
    if not names:
        return []
    lines = [f"| row | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for row in rows:
        if row["difference"]:
            found = row["difference"]
            entries = [f"{found[name]['points']:+.1f} ({interval(widest(found[name]))})" for name in names]
        else:
            entries = [f"{row['mean'][name]:.1f}" if row["mean"] else "" for name in names]
        lines.append(f"| {row['row']} | {' | '.join(entries)} |")
    return lines


def _notes(rows: Sequence[Tree]) -> list[str]:
    """What the trainer reported, once for all seeds that it was said of, and what failed."""
    lines = []
    for row in rows:
        said: dict[str, tuple[str, list[int]]] = {}
        for seed in row["seeds"]:
            for report in seed["reports"]:
                said.setdefault(re.sub(r"[\d.e%+-]+", "", report), (report, []))[1].append(seed["seed"])
        for text, seeds in said.values():
            lines.append(f"* {row['row']}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {text}")
        lines += [f"* {cell}: {why.splitlines()[0]}" for cell, why in row["failures"].items()]
    return [*lines, ""] if lines else []


def _tuning(tuned: dict[str, dict[str, float]]) -> list[str]:
    factors = list(dict.fromkeys(factor for scores in tuned.values() for factor in scores))
    lines = [
        "Average on validation with each factor of the learning rates; the best one of each row was taken.",
        "",
        f"| row | {' | '.join(f'x {factor}' for factor in factors)} |",
        f"|---|{'---:|' * len(factors)}",
    ]
    for row, scores in tuned.items():
        best = max(scores.values())
        cells = [_marked(scores.get(factor), best) for factor in factors]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def _marked(score: float | None, best: float) -> str:
    if score is None:
        return "failed"
    return f"**{score:.1f}**" if score == best else f"{score:.1f}"


def interval(ends: Sequence[float]) -> str:
    """An interval of points: "-0.3 to +1.2"."""
    return "{:+.1f} to {:+.1f}".format(*ends)
