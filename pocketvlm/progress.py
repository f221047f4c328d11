"""Progress of a run: a bar with the remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_LAST_PART = 0.98  # of a step's share that is shown before it ended, however long it takes
_TICK_S = 0.5
_LINE_S = 10.0  # between two lines about one step, where there is no terminal
_PACE_S, _PACE_PART = 10.0, 0.02  # of a step must be behind us until its own pace says more than what was expected


class Ended(Protocol):
    """What is shown of a step that ended."""

    @property
    def step(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def why(self) -> str: ...
    @property
    def seconds(self) -> float | None: ...


class Progress:
    """Shows where a run is; use as a context manager.

    Args:
        quiet: show nothing at all (--json).
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stream = os.fdopen(os.dup(2), "w")  # of its own: the stages' output goes elsewhere while they run
        self._expected: dict[str, float] = {}
        self._done_s = 0.0
        self._current: tuple[str, float] | None = None  # title, begin
        self._fraction, self._said = 0.0, 0.0
        self._hidden: dict[str, float] = {}
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._bar:
            self._bar.stop()
        self._stream.close()

    def start(self, expected: dict[str, float]) -> None:
        """Begin: title -> expected seconds of every step that will run, in order."""
        self._expected = dict(expected)
        if not expected or self._quiet:
            return
        if self._stream.isatty():
            self._open_bar(sum(expected.values()))
        else:
            self._line(f"{len(expected)} step{'s' if len(expected) > 1 else ''}, about {span(sum(expected.values()))}")

    def single(self, title: str, expected_s: float) -> None:
        """Begin work that is one step; it is shown from its first `update` on, when what was asked for is possible."""
        self._current, self._fraction, self._hidden = (title, time.monotonic()), 0.0, {title: expected_s}

    def note(self, text: str) -> None:
        """Show a line of its own."""
        self._line(text)

    def begin(self, title: str, why: str) -> None:
        """A step begins."""
        self._current, self._fraction = (title, time.monotonic()), 0.0
        self._line(f"{title}: begins ({why}); about {span(self.remaining_s())} to go")
        self.update(0.0, title)

    def update(self, fraction: float, message: str) -> None:
        """The running step is `fraction` (0 to 1) done."""
        if self._hidden:
            self.start(self._hidden)
            self._hidden = {}
        self._fraction = max(self._fraction, fraction)
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=message)
        elif time.monotonic() - self._said >= _LINE_S:
            self._line(f"{message}; about {span(self.remaining_s())} to go")

    def end(self, outcome: Ended) -> None:
        """A step ended, or was not needed."""
        self._current = None
        self._done_s += self._expected.pop(outcome.step, 0.0)
        took = f" in {span(outcome.seconds)}" if outcome.seconds is not None else ""
        why = f": {outcome.why}" if outcome.state in ("failed", "left out") else ""
        self._line(f"{outcome.step}: {outcome.state}{took}{why}")

    def remaining_s(self) -> float:
        """Seconds that the steps still to be done are expected to take; the running one, if it says so, at its pace."""
        rest = sum(self._expected.values()) - self._running_s()
        if self._current is None or self._fraction < _PACE_PART:
            return rest
        title, begin = self._current
        elapsed = time.monotonic() - begin
        if elapsed < _PACE_S:
            return rest
        later = sum(seconds for name, seconds in self._expected.items() if name != title)
        return later + elapsed * (1 - self._fraction) / self._fraction

    def _running_s(self) -> float:
        """Expected seconds of the running step that are behind us."""
        if self._current is None:
            return 0.0
        title, begin = self._current
        expected = self._expected.get(title, 0.0)
        elapsed = time.monotonic() - begin
        by_fraction = expected * self._fraction
        return min(max(by_fraction, elapsed if self._fraction == 0 else 0.0), expected * _LAST_PART)

    def _open_bar(self, total: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        left = TextColumn("{task.fields[left]}")
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), left)
        console = Console(file=self._stream)
        self._bar = Bar(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task("", total=total, left="")
        self._bar.start()
        threading.Thread(target=self._keep_ticking, daemon=True).start()

    def _keep_ticking(self) -> None:
        while not self._stop.wait(_TICK_S):
            self.tick()

    def tick(self) -> None:
        """Move the bar on by the time that went by."""
        if self._bar and self._task is not None:
            left = f"about {span(self.remaining_s())} to go"
            self._bar.update(self._task, completed=self._done_s + self._running_s(), left=left)

    def _line(self, text: str) -> None:
        if self._quiet:
            return
        self._said = time.monotonic()
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)


def span(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 35 s, 4 min 10 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
