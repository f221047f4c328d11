"""Child processes that say in JSON lines where they are, and that end with the process that started them."""

import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

TAIL = 3  # lines of a log that an error shows
Key = TypeVar("Key")
Event = dict[str, Any]


def start(
    key: Key,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    events: "Queue[tuple[Key, Event | None]]",
) -> "subprocess.Popen[str]":
    """Start a process and forward what it says.

    Args:
        key: what its events are marked with.
        command: the process and its arguments; its standard input stays open as long as this process lives.
        log: gets its standard error.
        environment: all of its variables.
        events: gets each JSON line of its standard output, and None when it has closed that.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
        )

    def forward() -> None:
        for line in process.stdout or []:
            if line.startswith("{"):
                events.put((key, json.loads(line)))
        events.put((key, None))

    threading.Thread(target=forward, daemon=True).start()
    return process


def say(**event: object) -> None:
    """In a child: tell the process that started it."""
    print(json.dumps(event), flush=True)


def end_with_parent() -> None:
    """In a child: end when standard input does, that is when the process that started it is gone."""

    def wait() -> None:
        # Not sys.stdin.read(): it would hold a lock for which every process forked from this one, such as a data
        # worker, waits for ever when multiprocessing closes its standard input.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def tail(log: Path) -> str:
    """The last lines of a log, indented; where several processes wrote it, not those of their launcher."""
    written = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = ([line for line in written if line.startswith("[rank")] or written)[-TAIL:]
    return "".join(f"  {line}\n" for line in found)
