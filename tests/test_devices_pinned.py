"""The runner is pinned to the fast processors, and there is a thread for each of them."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from device_bench.devices import _remote
from device_bench.sensors.cpus import mask
from tests.test_devices_bench import Board, artifact, bench, board
from vlm.errors import CheckFailed

__all__ = ["artifact", "board"]
FEW = sorted(os.sched_getaffinity(0))[:2]


def test_a_runner_that_does_not_run_where_it_was_pinned_gives_an_invalid_result(board: Board, artifact: Path) -> None:
    board.cluster = [63]
    type(board).prefix = property(lambda self: [])  # type: ignore[assignment, method-assign]
    try:
        with pytest.raises(CheckFailed, match=r"was to run on processors \[63\], it ran on"):
            bench(artifact)
    finally:
        del type(board).prefix


@pytest.mark.skipif(len(FEW) < 2, reason="one processor: nothing to be pinned to")
@pytest.mark.parametrize(
    ("threads", "said"), [(2, None), (1, "--threads 2 uses them all"), (3, "waited for each other")]
)
def test_there_is_a_thread_for_each_fast_processor_and_loading_is_pinned_to_them(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch, threads: int, said: str | None
) -> None:
    board.cluster = FEW
    begun: list[Sequence[str]] = []
    process = _remote.Process
    monkeypatch.setattr(_remote, "Process", lambda *words: begun.append(words[2]) or process(*words))  # type: ignore[func-returns-value]
    if threads == 3:
        with pytest.raises(CheckFailed, match=said):
            bench(artifact, threads=threads)
        return
    notes = bench(artifact, threads=threads)["notes"]
    assert any("fast processors" in note for note in notes) == bool(said)
    assert begun[0][:2] == ["taskset", mask(board.cluster)]
