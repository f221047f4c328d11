"""Who listens where: everything of the rig on 127.0.0.1 alone."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> set[str]:
    """Addresses on which somebody listens on a port."""
    return {address for address, listens_on, _ in _listeners() if listens_on == port}


def of_processes(pids: set[int]) -> set[str]:
    """Addresses on which this process, one that it has started, or one of these listens."""
    sockets = {inode for pid in pids | _family() for inode in _sockets(pid)}
    return {address for address, _, inode in _listeners() if inode in sockets}


def _listeners() -> Iterator[tuple[str, int, str]]:
    """Address, port and inode of every listening socket."""
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            address, _, port = words[1].rpartition(":")
            if words[3] == "0A":
                yield address, int(port, 16), words[9]


def _sockets(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor)):
                    yield match[1]


def _family() -> set[int]:
    """This process and all below it."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found
