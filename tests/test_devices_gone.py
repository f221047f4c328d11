"""A device that goes for good in the middle of a bench: what it measured is kept, and it is waited for once."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from device_bench.devices import _link
from tests.test_devices_bench import Board, artifact, bench, board
from vlm.errors import UserError

__all__ = ["artifact", "board"]


def leave(board: Board, monkeypatch: pytest.MonkeyPatch, kind: str, after: int = 0) -> list[float]:
    """Let the device go before the runner answers in a pass; returns what is waited for."""
    answer, asked = board.answer, 0
    waits: list[float] = []

    def monotonic() -> float:
        waits.append(1000.0 * len(waits))
        return waits[-1]

    def check() -> None:
        raise UserError("--device shell: gone.")

    def start(job: Any, *words: Any) -> Any:
        nonlocal asked
        if job.kind == kind and asked == after:
            board.link.breaks = 10**9  # type: ignore[attr-defined]
            monkeypatch.setattr(board.link, "check", check)
            monkeypatch.setattr(_link, "time", SimpleNamespace(monotonic=monotonic, sleep=lambda seconds: None))
        asked += job.kind == kind
        return answer(job, *words)

    monkeypatch.setattr(board, "answer", start)
    return waits


def test_what_was_measured_before_the_device_went_is_kept_as_an_invalid_result(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(board, monkeypatch, "memory")
    with pytest.raises(UserError, match="gone"):
        bench(artifact)
    result = json.loads(next((artifact.parent / "results").rglob("fake-fp32.json")).read_text())
    assert result["valid"] is False and "gone" in result["invalid_because"]
    assert result["decode_tok_s"] and result["peak_rss_mb"] is None


def test_answers_of_finished_blocks_are_kept(board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_bench.devices._passes.BLOCK_BYTES", 8 * 8 * 4 * 3)
    leave(board, monkeypatch, "accuracy", after=1)
    with pytest.raises(UserError, match="gone"):
        bench(artifact, tasks=["scenes"], scenes=2)
    assert next((artifact.parent / "results").rglob("*.answers.jsonl")).read_text().count("\n") > 0


def test_an_older_result_survives_a_device_in_use(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bench(artifact)

    def push(artifact: Path) -> Path:
        raise UserError("in use")

    monkeypatch.setattr(board, "push", push)
    with pytest.raises(UserError, match="in use"):
        bench(artifact)
    assert json.loads(next((artifact.parent / "results").rglob("fake-fp32.json")).read_text()) == before


def test_a_device_that_was_waited_for_in_vain_is_not_waited_for_again(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = leave(board, monkeypatch, "load")
    with pytest.raises(UserError, match="gone"):
        bench(artifact)
    assert len(waits) == 2  # when the wait began, and when it was over
