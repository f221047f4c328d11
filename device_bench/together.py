"""Devices that share a benchmark: each answers a part of the questions, and all results hold the score over all."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device_bench.evaluate import load_answers, publish, save_answers, score
from vlm.folders import write_atomic


def merge(results: Sequence[Path]) -> None:
    """Put the accuracy over all answers, and the answers themselves, into each of the results that share them.

    Args:
        results: of one artifact, each from a device that answered its part (`BenchConfig.part`).
    """
    trees: list[dict[str, Any]] = [json.loads(path.read_text()) for path in results]
    parts = [load_answers(path.with_name(tree["answers"])) for path, tree in zip(results, trees, strict=True)]
    samples = [sample for part in parts for sample in part]
    told = [(name, one["details"]) for tree in trees for name, one in tree["accuracy"]["tasks"].items()]
    editions = {name: details["data"] for name, details in told if "data" in details}
    accuracy = publish(score(samples), editions)
    names = [f"{tree['device']['name']} {len(part):,}" for tree, part in zip(trees, parts, strict=True)]
    note = f"accuracy: the questions were shared, answers by {', '.join(names)}"
    for path, tree in zip(results, trees, strict=True):
        save_answers(samples, path.with_name(tree["answers"]))
        tree |= {"accuracy": accuracy, "notes": [*tree["notes"], note]}
        write_atomic(path, json.dumps(tree, indent=1) + "\n")
