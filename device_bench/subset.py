"""A part of a benchmark that stands for the whole: drawn with a seed, within strata, question groups kept whole."""

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device_bench.evaluate import questions, versions
from device_bench.tasks.base import BenchQuestion, cluster


def chosen(
    tasks: Sequence[str], scenes: int, data: str | None, limit: int | None, part: tuple[int, int] = (0, 1)
) -> tuple[list[BenchQuestion], dict[str, dict[str, Any]]]:
    """What a bench asks, and which editions of real benchmarks it is from.

    Args:
        tasks, scenes, data, limit, part: as in BenchConfig.
    Raises:
        UserError: there is no such benchmark, or its questions are not there.
    """
    asked = questions(tasks, scenes, Path(data) if data else None)
    drawn = subset(asked, limit, 0) if limit else asked
    first, parts = part
    pictures = set(list(dict.fromkeys(map(cluster, drawn)))[first::parts])
    return [question for question in drawn if cluster(question) in pictures], versions(asked)


def subset(questions: Sequence[BenchQuestion], limit: int, seed: int) -> list[BenchQuestion]:
    """Draw about `limit` questions of each family.

    Strata are kind and category (MME's categories, POPE's settings, GQA's structural types, ScienceQA with and without
    image); each gets its share, to the nearest question. Groups that are scored together (MME's pairs, MMBench's
    rotations) are drawn whole, so that a subset has every score that the whole has.

    Args:
        questions: of one or more families.
        limit: questions per family; the last groups drawn may exceed it by less than a group each.
        seed: another seed draws another subset; the same one the same, whatever the order of the questions.
    Returns:
        The questions drawn, in their order.
    """
    families: dict[str, list[BenchQuestion]] = defaultdict(list)
    for question in questions:
        families[question.family].append(question)
    drawn = {(question.family, question.id) for family in families.values() for question in _draw(family, limit, seed)}
    return [question for question in questions if (question.family, question.id) in drawn]


def _draw(questions: Sequence[BenchQuestion], limit: int, seed: int) -> list[BenchQuestion]:
    strata: dict[tuple[str, str], dict[str, list[BenchQuestion]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        strata[question.kind, question.category][question.group].append(question)
    sizes = {name: sum(map(len, groups.values())) for name, groups in strata.items()}
    shares = _shares(sizes, min(limit, len(questions)))
    drawn: list[BenchQuestion] = []
    for name, groups in sorted(strata.items()):
        order = sorted(groups)
        random.Random(f"{seed} {name}").shuffle(order)
        taken = 0
        for group in order:
            if taken >= shares[name]:
                break
            drawn += groups[group]
            taken += len(groups[group])
    return drawn


def _shares(sizes: dict[tuple[str, str], int], limit: int) -> dict[tuple[str, str], int]:
    """Largest remainders: whole numbers that add up to `limit` in the proportion of `sizes`."""
    total = sum(sizes.values())
    exact = {name: limit * size / total for name, size in sizes.items()}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: limit - sum(shares.values())]:
        shares[name] += 1
    return shares
