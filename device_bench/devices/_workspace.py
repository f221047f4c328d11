"""The one folder on a device that is ours: files go in checked, everything is removed at the end."""

import re
from collections.abc import Mapping
from pathlib import Path

from device_bench.devices._link import Link, Lost, quote
from vlm.errors import UserError
from vlm.folders import sha256

# Of a file or folder below ours. No "..", no blanks, nothing that any shell or protocol takes for more than a name.
NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*")
SECONDS_PER_BYTE = 1 / 500_000  # a slow cable
HASHING_S = 120.0
ATTEMPTS = 3
NO_SPACE = "No space left on device"
MARKER = ".pocketvlm"  # lies in a folder that this program made; any other is somebody's
_NOT_OURS = 4
_OWN = f"""
[ -e {{root}}/{MARKER} ] && exit 0
rmdir {{root}} 2>/dev/null
if [ -e {{root}} ] || [ -L {{root}} ]; then exit {_NOT_OURS}; fi
mkdir {{root}} && : >{{root}}/{MARKER}
"""


class Workspace:
    """A folder on a device.

    Args:
        link: the connection.
        root: absolute path of the folder; `own` makes it, `remove` removes it with all that is in it.
    """

    def __init__(self, link: Link, root: str) -> None:
        if not re.fullmatch(r"(/[.]?[A-Za-z0-9_+-][A-Za-z0-9._+-]*){2,}", root):
            raise UserError(
                f"--device {link.spec}: {root!r} is no folder that can be worked in: a plain path expected."
            )
        self.link, self.root = link, root

    def path(self, *names: str) -> str:
        """The path of a file in the folder.

        Raises:
            UserError: a name would lead out of the folder, or is none that every device can hold.
        """
        parts = [part for name in names for part in name.split("/")]
        for part in parts:
            if not NAME.fullmatch(part):
                raise UserError(
                    f"{'/'.join(names)!r}: {part!r} cannot be a file's name on the device; letters, digits and ._+- "
                    "expected. Rename it."
                )
        return "/".join([self.root, *parts])

    def own(self) -> None:
        """Make the folder with a marker in it, or find the marker of an earlier bench.

        Raises:
            UserError: the folder is somebody else's, or cannot be made.
            Lost: the connection broke.
        """
        done = self.link.run(_OWN.format(root=quote(self.root)))
        if done.code == _NOT_OURS:
            raise UserError(
                f"--device {self.link.spec}: {self.root} is there, and no bench has made it: it has no {MARKER}. "
                "Move it away and try again."
            )
        if done.code != 0:
            raise self._not_made(done.err)

    def is_somebodys(self) -> bool:
        """Whether there is a folder of this name that no bench has made."""
        return self.link.run(f"[ -e {quote(self.root)} ] && ! [ -e {quote(self.root)}/{MARKER} ]").code == 0

    def push(self, files: Mapping[str, Path]) -> list[str]:
        """Bring files there: only those whose content is not there yet, each checked by its SHA-256 afterwards.

        Args:
            files: path below the folder -> file on this machine.
        Returns:
            The paths that were sent.
        Raises:
            UserError: the device is full, or does not keep what it gets.
            Lost: the connection broke, and again after it came back.
        """
        wanted = {name: sha256(file) for name, file in files.items()}
        there = self._hashes(wanted)
        missing = [name for name in wanted if there.get(name) != wanted[name]]
        if not missing:
            return []
        self._check_room(sum(files[name].stat().st_size for name in missing))
        folders = sorted({self.path(name).rpartition("/")[0] for name in missing})
        self.link.words("mkdir", "-p", *folders)
        for name in missing:
            self._send(files[name], self.path(name))
        there = self._hashes({name: wanted[name] for name in missing})
        if damaged := [name for name in missing if there.get(name) != wanted[name]]:
            raise UserError(
                f"--device {self.link.spec}: {damaged[0]} arrived with another SHA-256 than it was sent with. Check "
                "the cable and the free space, and try again."
            )
        return missing

    def write(self, name: str, text: str, scratch: Path) -> None:
        """Write a small file there, by way of the file `scratch` on this machine."""
        scratch.write_text(text)
        self.push({name: scratch})

    def pull(self, name: str, to: Path) -> None:
        """Fetch a file, checked by its SHA-256.

        Raises:
            UserError: it is not there, or changed on the way.
            Lost: the connection broke.
        """
        self.link.fetch(self.path(name), to, HASHING_S)
        if self._hashes({name: ""}).get(name) != sha256(to):
            raise UserError(f"--device {self.link.spec}: {name} changed while it was fetched. Try again.")

    def remove(self) -> None:
        """Remove the folder and make sure that it is gone.

        Raises:
            UserError: something of it is still there.
            Lost: the connection broke.
        """
        # The marker goes last: a removal that is cut off can be taken up again.
        done = self.link.run(
            f"rm -rf {quote(self.root)}/*; rm -rf {quote(self.root)}; ! [ -e {quote(self.root)} ]", HASHING_S
        )
        if done.code != 0:
            reason = done.err.strip().splitlines()[-1:] or ["no reason given"]
            raise UserError(
                f"--device {self.link.spec}: {self.root} cannot be removed: {reason[0]}. Remove it by hand."
            )

    def _hashes(self, names: Mapping[str, str]) -> dict[str, str]:
        """SHA-256 of those of the files that are there."""
        paths = {self.path(name): name for name in names}
        found: dict[str, str] = {}
        # A few at a time: a command line has an end.
        ordered = list(paths)
        for start in range(0, len(ordered), 50):
            done = self.link.run(f"sha256sum {quote(*ordered[start : start + 50])} 2>/dev/null", HASHING_S)
            for line in done.out.splitlines():
                if (match := re.fullmatch(r"([0-9a-f]{64}) [ *](/\S+)", line.strip())) and match[2] in paths:
                    found[paths[match[2]]] = match[1]
        return found

    def _check_room(self, needed: int) -> None:
        parent = self.root.rpartition("/")[0]
        done = self.link.run(f"mkdir -p {quote(self.root)} && df -k {quote(parent)}")
        if done.code != 0:
            raise self._not_made(done.err)
        match = re.search(r"\s(\d+)\s+\d+%\s+/\S*\s*$", done.out)
        if match and int(match[1]) * 1024 < needed:
            raise self._full(needed, int(match[1]) // 1024)

    def _not_made(self, said: str) -> UserError:
        reason = said.strip().splitlines()[-1:] or ["no reason given"]
        return UserError(f"--device {self.link.spec}: {self.root} cannot be made: {reason[0]}.")

    def _full(self, needed: int, free_mb: int | None) -> UserError:
        found = "" if free_mb is None else f", {free_mb} MiB are free"
        return UserError(
            f"--device {self.link.spec}: the device is full: {needed / 2**20:.0f} MiB are needed in {self.root}{found}."
            " Delete something there and try again."
        )

    def _send(self, file: Path, to: str) -> None:
        """Send one file; where the connection breaks, wait for it and send again."""
        size = file.stat().st_size
        for attempt in range(ATTEMPTS):
            try:
                self.link.send(file, to, HASHING_S + size * SECONDS_PER_BYTE)
                return
            except Lost:
                if attempt == ATTEMPTS - 1:
                    raise
                self.link.wait()
            except UserError as error:
                if NO_SPACE in str(error):
                    raise self._full(size, None) from error
                raise
