"""A device that is this machine's shell in a folder: the same scripts as over adb, without a connection's cost."""

import os
import shutil
from pathlib import Path

from device_bench.devices._link import Link, Lost
from vlm.errors import UserError

# Words that a shell would take for something else.
NASTY = ["a b", "$(touch x)", "`id`", "'", '"', "\\", "*", ";", "&", "|", "\n", "-n", "", "é€", "~", "#"]


class ShellLink(Link):
    """Runs scripts here; connections can be made to break.

    Attributes:
        breaks: how many of the next scripts find the connection broken.
        cut_after: how many lines a followed script gives before its connection ends; None for all.
    """

    spec = "shell"

    def __init__(self) -> None:
        self.breaks = 0
        self.cut_after: list[int] = []
        self.sent: list[str] = []
        self.damage = False
        self.revived = 0

    def check(self) -> None:
        """There is nothing to check, unless it is broken."""
        if self.breaks:
            raise UserError("--device shell: broken.")

    def command(self, script: str) -> list[str]:
        """Run by sh; a broken connection ends at once, one to be cut ends early."""
        if self.breaks:
            return ["sh", "-c", "echo error: closed >&2; exit 1"]
        if self.cut_after and "@time" in script:
            return ["sh", "-c", 'sh -c "$1" | head -n $2', "sh", script, str(self.cut_after.pop(0))]
        return ["sh", "-c", script]

    def send(self, file: Path, to: str, timeout_s: float) -> None:
        """Copy."""
        if self.breaks:
            raise Lost("closed")
        shutil.copy(file, to)
        os.chmod(to, 0o700)
        if self.damage:
            Path(to).write_bytes(b"?" + file.read_bytes()[1:])
        self.sent.append(to)

    def fetch(self, file: str, to: Path, timeout_s: float) -> None:
        """Copy."""
        if not Path(file).is_file():
            raise UserError(f"--device shell: {file}: No such file")
        shutil.copy(file, to)

    def revive(self) -> None:
        """One break less."""
        self.revived += 1
        self.breaks = max(0, self.breaks - 1)
