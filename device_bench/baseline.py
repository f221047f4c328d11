"""What a baseline in git keeps of a report: what the gate and README.md's figures are made from."""

import json
from pathlib import Path

from device_bench.credits import pack
from device_bench.gate import artifact_name
from device_bench.judge import Tree, busy_while
from device_bench.judge_accuracy import Entry
from device_bench.metrics import LATENCY_NAMES
from vlm.folders import write_atomic

ARTIFACT_KEYS = ("name", "format", "precision", "bytes", "parity")
BENCH_KEYS = (
    "device",
    "settings",
    "valid",
    "invalid_because",
    *LATENCY_NAMES,
    "peak_rss_mb",
    "accuracy",
    "reasons",
)


def slim(report: Tree, folder: Path | None = None) -> Tree:
    """The part of a report that a baseline needs, without paths to samples and answers.

    Args:
        report: report.json.
        folder: where it lies; with the answers in reach the baseline keeps each answer's credit, so that the gate can
            compare question by question.
    """
    artifacts = [
        {
            **{key: artifact.get(key) for key in ARTIFACT_KEYS},
            "benches": [{**_bench(bench), **_credits(bench, folder)} for bench in artifact["benches"]],
        }
        for artifact in report["artifacts"]
    ]
    models = {
        who: {"accuracy": model["accuracy"], **_credits(model, folder)}
        for who, model in report["models"].items()
        if model.get("accuracy")
    }
    return {
        "schema": 1,
        "run": report.get("run"),
        "models": models,
        "artifacts": artifacts,
        "gate": None,
    }


def _bench(bench: Tree) -> Tree:
    return {**{key: bench.get(key) for key in BENCH_KEYS}, "state": {"busy": busy_while(bench)}}


def _credits(record: Tree, folder: Path | None) -> Tree:
    samples = Entry(record, folder).answers()
    return {"credits": pack(samples)} if samples else {}


def write_baseline(report: Tree, folder: Path, file: Path) -> list[str]:
    """Make a report the baseline that later ones are compared with.

    Returns:
        Names of the artifacts whose speed was measured on a busy machine: nothing is held to it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(slim(report, folder), indent=1) + "\n")
    return [artifact_name(artifact) for artifact in report["artifacts"] if any(map(busy_while, artifact["benches"]))]
