"""What the bench needs of a device: identify it, bring an artifact there, run a pass, fetch what it wrote, clean up."""

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device_bench.telemetry import Identity
from vlm.errors import UserError

Progress = Callable[[float, str], None]


def within(on_progress: Progress, start: float, total: float, width: float = 1, prefix: str = "") -> Progress:
    """Progress of a part that runs from `start` to `start + width` of `total`."""
    return lambda done, text: on_progress((start + width * done) / total, prefix + text)


def as_folder(spec: str) -> str:
    """A device's specification as the name of a folder."""
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in spec)


class Device(ABC):
    """One place where artifacts run; `spec` is how the user names it on the command line."""

    spec: str
    settings: frozenset[str] = frozenset()  # of BenchConfig that its passes need besides those of every device

    @property
    def folder_name(self) -> str:
        """`spec` as the name of a folder."""
        return as_folder(self.spec)

    @abstractmethod
    def identify(self) -> Identity:
        """Say what the device is.

        Raises:
            UserError: it cannot be reached; the message tells which state it is in and the next step.
        """

    @abstractmethod
    def push(self, artifact: Path) -> Path:
        """Bring an artifact to the device and return what a job calls it."""

    @abstractmethod
    def run(self, job: dict[str, Any], log: Path, timeout_s: float, on_progress: Progress) -> dict[str, Any]:
        """Run one pass in a fresh process and return its result.

        Args:
            job: kind, artifact (as `push` returned it) and the settings of device_bench.worker.Job.
            log: file on this machine that receives what the process printed.
            timeout_s: the process is killed when it takes longer.
            on_progress: fraction of the pass, and what is being done.
        Raises:
            UserError: the process asks the user to change something.
            CheckFailed: the process crashed or was killed; the message names signal and log.
        """

    @abstractmethod
    def pull(self, name: str, to: Path) -> None:
        """Fetch a file that the last pass wrote; nothing happens when it did not get to write it."""

    @abstractmethod
    def interrupt(self) -> None:
        """Let a pass that another thread runs end with KeyboardInterrupt, and `clean_up` be short: Ctrl-C."""

    def clean_up(self) -> None:  # noqa: B027  (optional: there may be nothing to remove)
        """Remove what `push` and `run` left on the device."""


def captured(arguments: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a short command, output captured, without a shell; raises subprocess.TimeoutExpired."""
    return subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )


def call(arguments: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """`captured`, with a message where it does not end.

    Raises:
        UserError: it did not end in time.
    """
    try:
        return captured(arguments, timeout_s)
    except subprocess.TimeoutExpired as error:
        words = " ".join(arguments)
        raise UserError(f"{words}: no answer in {timeout_s:g} s. Check the cable or network and try again.") from error


def memory_mb(meminfo: str) -> int | None:
    """Total memory in MiB from the text of /proc/meminfo."""
    for line in meminfo.splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return None
