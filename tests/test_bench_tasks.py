"""The bench asks real benchmarks, here and on a board, and misses what is not there before it measures."""

from pathlib import Path
from typing import Any

import pytest

from device_bench.config import BenchConfig
from device_bench.evaluate import load_answers
from device_bench.run import run
from tests import test_devices_bench as remote
from tests.layouts import LLAVA
from tests.test_bench_local import QUICK, artifact, fake_engine, measure
from tests.test_devices_bench import board
from vlm.errors import UserError

__all__ = ["board", "fake_engine"]


def check(result: dict[str, Any], results: Path) -> None:
    assert result["valid"] and result["settings"]["limit"] == 4
    found = result["accuracy"]["tasks"]["pope"]
    assert found["details"]["data"]["questions"] == 6 and found["details"]["line"].startswith("POPE F1")
    assert len(load_answers(results / result["answers"])) == found["n"] == 4


@pytest.mark.usefixtures("fake_engine")
def test_a_real_benchmark_is_asked_and_its_edition_told(tmp_path: Path) -> None:
    LLAVA["pope"](tmp_path / "data")
    result = measure(artifact(tmp_path), tasks=["pope"], data=str(tmp_path / "data"), limit=4)
    check(result, tmp_path / "results" / "local")


@pytest.mark.usefixtures("board")
def test_a_real_benchmark_is_asked_on_a_board(tmp_path: Path) -> None:
    LLAVA["pope"](tmp_path / "data")
    result = remote.bench(artifact(tmp_path), tasks=["pope"], data=str(tmp_path / "data"), limit=4)
    check(result, tmp_path / "results" / "ssh-me-board-22")


def test_questions_that_are_not_there_are_missed_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"coco_pope_random\.json here"):
        run(BenchConfig(**{**QUICK, "tasks": ["pope"], "data": str(tmp_path)}), [artifact(tmp_path)], tmp_path / "out")
    with pytest.raises(UserError, match="give it with --data"):
        BenchConfig(tasks=["pope"])
