"""What is shown of work while it runs: how far it is, and how long it will take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocketvlm.progress import Progress, span

ROOT = Path(__file__).parents[1]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock that progress is told by; its one entry is set."""
    clock = [100.0]
    monkeypatch.setattr("pocketvlm.progress.time.monotonic", lambda: clock[0])
    return clock


def test_without_a_terminal_a_long_step_says_now_and_then_where_it_is(
    now: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with Progress() as progress:
        progress.single("export", 100.0)
        progress.update(0.0, "writing")
        for second in (4.0, 11.0, 15.0, 50.0):
            now[0] = 100.0 + second
            progress.update(second / 100, f"at {second:.0f}")
    assert capfd.readouterr().err.splitlines() == [
        "1 step, about 1 min 40 s",
        "at 11; about 1 min 29 s to go",
        "at 50; about 50 s to go",
    ]


def test_work_that_is_slower_than_expected_is_judged_by_its_own_pace(
    now: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with Progress() as progress:
        progress.single("scan", 100.0)
        progress.update(0.0, "begins")
        now[0] = 150.0
        progress.update(0.1, "layer 1 of 10")
    assert capfd.readouterr().err.splitlines()[-1] == "layer 1 of 10; about 7 min 30 s to go"


def test_progress_is_plain_lines_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.start({"a": 60.0, "b": 30.0})
        progress.begin("a", "not built yet")
    assert capfd.readouterr().err.splitlines() == [
        "2 steps, about 1 min 30 s",
        "a: begins (not built yet); about 1 min 30 s to go",
    ]


def test_work_of_one_step_is_announced_when_it_is_possible(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.single("a", 60.0)
        assert capfd.readouterr().err == ""
        progress.update(0.1, "a tenth")
        progress.update(0.2, "a fifth")
    assert capfd.readouterr().err == "1 step, about 1 min 0 s\n"


def test_progress_is_a_bar_with_the_remaining_time_on_a_terminal() -> None:
    code = (
        "from pocketvlm.progress import Progress\n"
        "with Progress() as p:\n p.start({'a': 60.0, 'b': 30.0}); p.begin('a', 'new'); p.update(0.5, 'half'); p.tick()"
    )
    leader, follower = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=follower, env=environment, check=True, timeout=60)
    os.close(follower)
    shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert "half" in shown and "about 1 min 0 s to go" in shown


@pytest.mark.parametrize(("seconds", "text"), [(4.24, "4.2 s"), (35.2, "35 s"), (250, "4 min 10 s")])
def test_spans_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert span(seconds) == text
