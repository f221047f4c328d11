"""One connection to a device: run shell scripts there, send and fetch files. adb and ssh differ in nothing else.

Nothing that a user or a device says ever becomes part of a script without `quote`.
"""

import queue
import secrets
import shlex
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from device_bench.devices.base import captured
from vlm.errors import UserError

ANSWER_S = 20.0
RECONNECT_S = 180.0
POLL_S = 0.5


class Lost(Exception):
    """The connection broke or the device stopped answering; it may come back."""


@dataclass(frozen=True)
class Done:
    """How a script ended."""

    code: int
    out: str
    err: str


def quote(*words: str) -> str:
    """Words as the device's shell reads them back unchanged."""
    return shlex.join(words)


class Link(ABC):
    """A connection to one device.

    Attributes:
        gone: whether it was waited for in vain.
        interrupted: whether whatever waits shall end with KeyboardInterrupt; another thread sets it.
        patience_s: how long a broken connection is waited for.
    """

    spec: str
    gone = False
    interrupted = False
    patience_s = RECONNECT_S

    @abstractmethod
    def check(self) -> None:
        """Make sure that the device can be used now.

        Raises:
            UserError: it cannot; the message tells which state it is in and the next step.
        """

    @abstractmethod
    def command(self, script: str) -> list[str]:
        """The program and arguments on this machine that run a script in the device's shell."""

    @abstractmethod
    def send(self, file: Path, to: str, timeout_s: float) -> None:
        """Write a file to the device, readable and executable.

        Raises:
            Lost: the connection broke.
            UserError: the device refused it.
        """

    @abstractmethod
    def fetch(self, file: str, to: Path, timeout_s: float) -> None:
        """Read a file from the device.

        Raises:
            Lost: the connection broke.
            UserError: there is no such file.
        """

    def revive(self) -> None:  # noqa: B027  (only some connections must be asked to come back)
        """Ask for the connection to be made anew."""

    def run(self, script: str, timeout_s: float = ANSWER_S) -> Done:
        """Run a script to its end.

        Its exit code is printed behind its output: without that line the connection broke, whatever the program on this
        machine says. What a login's own start-up file prints comes before the first mark and is left out.

        Raises:
            Lost: the connection broke, or there was no answer in time.
        """
        mark = f"@{secrets.token_hex(8)}@"
        whole = f"echo {quote(mark)}\n(\n{script}\n)\nprintf '\\n%s %s\\n' {quote(mark)} $?"
        try:
            done = captured(self.command(whole), timeout_s)
        except subprocess.TimeoutExpired as error:
            raise Lost(f"no answer in {timeout_s:g} s") from error
        out, found, code = done.stdout.replace("\r\n", "\n").rpartition(f"\n{mark} ")
        _, begun, out = out.partition(f"{mark}\n")
        if not (begun and found) or not code.strip().isdigit():
            said = (done.stderr.strip() or done.stdout.replace(mark, "").strip()).splitlines()
            raise Lost(said[-1] if said else "the connection closed")
        return Done(int(code), out, done.stderr)

    def words(self, *command: str, timeout_s: float = ANSWER_S) -> Done:
        """Run one command given as words."""
        return self.run(quote(*command), timeout_s)

    def output(self, *command: str) -> str:
        """Output of a command; empty where it fails, as it does where there is no such file or program."""
        done = self.words(*command)
        return done.out if done.code == 0 else ""

    def follow(self, script: str, silence_s: float) -> Iterator[str]:
        """Yield a long script's lines as they come.

        Args:
            script: what to run; it must print something more often than every `silence_s` seconds.
            silence_s: a device that is silent for longer has stalled.
        Raises:
            Lost: the device stalled. Where the connection just ends, so do the lines.
        """
        process = subprocess.Popen(
            self.command(script),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        try:
            while (line := self._next(lines, silence_s)) is not None:
                yield line.rstrip("\r\n")
        finally:
            process.kill()
            process.wait()
            reader.join()

    def _next(self, lines: queue.Queue[str | None], silence_s: float) -> str | None:
        for _ in range(max(1, round(silence_s / POLL_S))):
            if self.interrupted:
                raise KeyboardInterrupt
            with suppress(queue.Empty):
                return lines.get(timeout=POLL_S)
        raise Lost(f"silent for {silence_s:g} s")

    def wait(self) -> None:
        """Wait until the device can be used again.

        Raises:
            UserError: it does not come back; the last state is told.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            back = True
            try:
                self.check()
            except UserError as error:
                back = False
                if time.monotonic() > deadline:
                    self.gone = True
                    raise UserError(
                        f"{error} (It was waited for {self.patience_s:g} s after the connection broke.)"
                    ) from error
            if self.interrupted:
                raise KeyboardInterrupt
            if back:
                self.gone = False
                return
            time.sleep(POLL_S)
            self.revive()

    def pause(self, seconds: float) -> None:
        """Do nothing for some seconds."""
        for _ in range(max(1, round(seconds / POLL_S))):
            if self.interrupted:
                raise KeyboardInterrupt
            time.sleep(POLL_S)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if line.endswith("\n"):  # the rest of the last line may have been on its way when the connection broke
                lines.put(line)
    lines.put(None)
