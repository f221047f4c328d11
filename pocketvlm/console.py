"""What the terminal shows: errors as one clear message with an exit code, results as tables or JSON."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vlm.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from rich.console import Console

DONE, CHECK_FAILED, USER_ERROR, CRASHED, INTERRUPTED = 0, 1, 2, 70, 130
PLAIN_WIDTH = 160  # of tables that go into a file or a pipe, in characters


def out() -> Console:
    """The console on stdout (rich is imported only when something is shown)."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def err() -> Console:
    """The console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a result as JSON and nothing else, for scripts."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; numbers and words alike are given as text."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out().print(table)


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send all that this process and its children print, engines in C++ included, to a file instead of the terminal.

    An error other than the expected two gets a note that names the file.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    kept = os.dup(1), os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except (CheckFailed, UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        error.add_note(f"What was printed before is in {log}.")
        raise
    finally:
        _flush()
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)


@contextmanager
def kept_stdout() -> Iterator[IO[str]]:
    """A second way to where stdout leads now, which `quietly` and `output_to` leave open."""
    _flush()
    with os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace") as stream:
        yield stream


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what libraries print off the terminal; --debug shows it, and when something goes wrong a file keeps it."""
    if "--debug" in sys.argv:
        yield
        return
    log = Path(tempfile.gettempdir()) / f"pocketvlm-output-{os.getpid()}.log"
    with output_to(log):
        yield
    log.unlink(missing_ok=True)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


@contextmanager
def exit_codes(debug: bool = False) -> Iterator[None]:
    """Turn what went wrong into one message on stderr and an exit code.

    0 done, 1 a check failed, 2 the user must change something, 130 interrupted; 70 for a fault of this program,
    whose traceback goes to a file (with `debug`, to the terminal).
    """
    try:
        yield
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _say("interrupted", "Nothing finished is lost: type the same command again to go on.", "yellow")
        raise
    except KeyboardInterrupt:
        _say("interrupted", "Nothing finished is lost: type the same command again to go on.", "yellow")
        sys.exit(INTERRUPTED)
    except CheckFailed as failure:
        _say("check failed", str(failure), "red")
        sys.exit(CHECK_FAILED)
    except UserError as error:
        _say("error", str(error), "red")
        sys.exit(USER_ERROR)
    except (OSError, MemoryError) as error:
        message = explain(error)
        if message is None or debug:
            _crashed(error, debug)
        _say("error", str(message), "red")
        sys.exit(USER_ERROR)
    except Exception as error:
        _crashed(error, debug)


@contextmanager
def ended_gently() -> Iterator[None]:
    """Let an end from outside (SIGTERM, SIGHUP) clean up as Ctrl-C does; one that is ignored, as by nohup, stays so."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    names = [name for name in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(name) is not signal.SIG_IGN]
    before = {name: signal.signal(name, interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def explain(error: OSError | MemoryError) -> str | None:
    """Say what the user can do about an error of the machine; None when it is no such error."""
    if isinstance(error, MemoryError):
        return "out of memory. Close other programs or take a smaller model; `pocketvlm doctor CONFIG` has a forecast."
    where = error.filename or "while writing"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{where}: the disk is full. Free some space and run the command again."
        case errno.EFBIG:
            return f"{where}: larger than the file size limit (ulimit -f). Raise the limit and run the command again."
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{where}: {error.strerror}. Change its permissions or choose another --out."
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR if error.filename:
            return f"{where}: {error.strerror}. Check the path."
        case errno.EMFILE | errno.ENFILE:
            return "too many open files. Raise the limit (ulimit -n 4096) and run the command again."
        case _:
            return None


def _say(kind: str, message: str, colour: str) -> None:
    from rich.markup import escape

    err().print(f"[bold {colour}]{kind}:[/] {escape(message)}")


def _crashed(error: BaseException, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
        sys.exit(CRASHED)
    log = Path(tempfile.gettempdir()) / f"pocketvlm-crash-{os.getpid()}.log"
    try:
        log.write_text("".join(traceback.format_exception(error)))
        where = f"The traceback is in {log}; `pocketvlm --debug ...` prints it."
    except OSError:
        where = "`pocketvlm --debug ...` prints the traceback."
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
    fault = f"{type(error).__name__}: {error}{notes}\nThis is a fault of pocketvlm. {where} Please report it."
    _say("internal error", fault, "red")
    sys.exit(CRASHED)
