"""What a stage could not train on: one JSON line per record with its path and the reason, in the run folder."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm.folders import write_atomic

TOO_LONG = "too_long.json"  # records that were left out before the training for their length


@dataclass(frozen=True)
class Entry:
    """A record that was left out, as a whole or some of its turns.

    Attributes:
        part: of the data; `record`: place in the part's file, from 0.
        id: the record's own, or empty where it could not be read.
        path: of what is broken: the records file or an image.
        reason: why.
        turns: how many turns were left out because they are too long; 0: the record is broken.
    """

    part: str
    record: int
    id: str
    path: str
    reason: str
    turns: int = 0

    @property
    def why(self) -> str:
        """Path, if one is broken, and reason."""
        return f"{self.path}: {self.reason}" if self.path else self.reason


class Quarantine:
    """The list of one stage; each process of a run appends to a file of its own, all are read.

    A record is counted once, however often it is met: in another epoch, after a resume, by another worker.

    Args:
        folder: made when there is something to write.
        stage: name of the stage.
        process: rank of this process.
    """

    def __init__(self, folder: Path, stage: str, process: int = 0) -> None:
        self.folder, self.process = folder / stage, process
        self.file = self.folder / f"{process}.jsonl"
        self.known = set(self.entries())

    def add(self, entries: Iterable[Entry]) -> bool:
        """Append the entries whose record is not listed yet; returns whether there were any."""
        fresh = {(entry.part, entry.record): entry for entry in entries if (entry.part, entry.record) not in self.known}
        if not fresh:
            return False
        self.known |= set(fresh)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(entry)) for entry in fresh.values()]
        # A line of its own even after one that a kill cut off; one write, because workers share the file.
        text = "\n".join(["", *lines, ""])
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "ab", buffering=0) as file:
            file.write(text.encode())
        return True

    def entries(self) -> dict[tuple[str, int], Entry]:
        """Everything listed by any process, by part and record; a line that a kill cut off is not counted."""
        found: dict[tuple[str, int], Entry] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text().split("\n"):
                try:
                    entry = Entry(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                found.setdefault((entry.part, entry.record), entry)
        return found

    def broken(self) -> list[Entry]:
        """The broken records, without those that only lost turns."""
        return [entry for entry in self.entries().values() if not entry.turns]

    def note_too_long(self, parts: dict[str, int], limit: int) -> None:
        """Write down how many records each part lost because they are longer than `limit` tokens; the first process."""
        if any(parts.values()) and self.process == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / TOO_LONG, json.dumps({"limit": limit, "parts": parts}))

    def report(self) -> list[str]:
        """What was left out, in plain sentences; from the files, so that it can be said after a resume."""
        said, name = [], self.folder.name
        if (self.folder / TOO_LONG).is_file():
            noted = json.loads((self.folder / TOO_LONG).read_text())
            parts = ", ".join(f"{part} {count}" for part, count in noted["parts"].items() if count)
            said.append(
                f"Stage {name}: {sum(noted['parts'].values())} records were left out because they are longer than "
                f"{noted['limit']} tokens ({parts})."
            )
        entries = self.entries().values()
        if shortened := [entry for entry in entries if entry.turns]:
            turns = sum(entry.turns for entry in shortened)
            said.append(
                f"Stage {name}: {turns} turns of {len(shortened)} records were left out because they are longer than "
                "the context with their prefix."
            )
        if broken := [entry for entry in entries if not entry.turns]:
            first = broken[0]
            said.append(
                f"Stage {name}: {len(broken)} records are broken and were left out, the first is record {first.record} "
                f"of {first.part}: {first.why.rstrip('.')}. All are in {self.folder.parent.name}/{name}."
            )
        return said
