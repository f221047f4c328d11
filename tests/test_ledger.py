"""The states of a product that the ledger's table names, and what becomes of what lies at its path."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketvlm.ledger import Ledger, OnProgress, Product, Step
from vlm.errors import CheckFailed


def step(run_dir: Path, inputs: str = "1", fail: bool = False) -> Step:
    """A step that adds a line to the one file of its folder."""
    folder = run_dir / "thing"

    def build(on_progress: OnProgress) -> list[Path]:
        partial = folder.with_name("thing.partial")
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / "lines").open("a") as file:
            file.write("built\n")
        if fail:
            raise CheckFailed("wrong")
        partial.rename(folder)
        return [folder]

    return Step("thing", (Product("thing", {"code": inputs}, path=folder),), build, 1)


def begun(run_dir: Path) -> None:
    with pytest.raises(CheckFailed):
        Ledger(run_dir).build(step(run_dir, fail=True), print)


def holds(run_dir: Path) -> None:
    Ledger(run_dir).build(step(run_dir), print)


def gone(run_dir: Path) -> None:
    holds(run_dir)
    shutil.rmtree(run_dir / "thing")


def unstamped(run_dir: Path) -> None:
    holds(run_dir)
    (run_dir / "stages" / "thing.json").unlink()


def finished_before_a_kill(run_dir: Path) -> None:
    begun(run_dir)
    (run_dir / "thing.partial").rename(run_dir / "thing")


@pytest.mark.parametrize(
    ("arrange", "inputs", "why", "lines"),
    [
        (lambda run_dir: None, "1", "not built yet", 1),
        (unstamped, "1", "not built yet", 1),
        (holds, "2", "code changed", 1),
        (begun, "1", "interrupted", 2),  # the stage found what the first attempt had left
        (begun, "2", "code changed", 1),
        (gone, "1", "thing is gone", 1),
        (finished_before_a_kill, "1", "interrupted", 1),
    ],
)
def test_each_state_is_named_and_keeps_or_clears_what_is_there(
    tmp_path: Path, arrange: Callable[[Path], None], inputs: str, why: str, lines: int
) -> None:
    arrange(tmp_path)
    ledger, now = Ledger(tmp_path), step(tmp_path, inputs)
    assert ledger.why(now.products[0]) == why
    ledger.build(now, print)
    assert ledger.why(now.products[0]) is None
    assert (tmp_path / "thing" / "lines").read_text() == "built\n" * lines


def test_what_was_finished_before_a_kill_is_not_built_again_and_has_no_time(tmp_path: Path) -> None:
    finished_before_a_kill(tmp_path)
    assert Ledger(tmp_path).build(step(tmp_path), print) is None
    stamp = Ledger(tmp_path).stamp("thing")
    assert stamp is not None and stamp.finished and stamp.seconds is None
