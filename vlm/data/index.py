"""A records file of any size, read one record at a time: where each record lies is found once and kept on disk."""

import hashlib
import io
import json
import mmap
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UserError
from vlm.folders import locked, write_atomic

Progress = Callable[[float], None]  # share done, from 0 to 1

VERSION = 1  # of what stands in a cache folder; another number builds it anew
HEAD = 1 << 16  # bytes at either end of a file that identify it, beside size and time of change
CHUNK = 1 << 24
NEWLINE, COMMA = ord("\n"), ord(",")
OPEN, CLOSE = frozenset(b"[{"), frozenset(b"]}")
STRING = rb'"(?:[^"\\]++|\\.)*+"'
# A whole string, or a character that tells where an element of a list begins or ends.
TOKEN = re.compile(STRING + rb"|[\[\]{},]", re.DOTALL)
# An element of at most four levels at once, which is most of a file: ten times as fast as token by token. Left to the
# tokens are deeper ones, [[[[[1]]]]], and what is no list or object, 7. A pattern may take [1} for an element: whether
# it is JSON is seen when it is read. "++" and "*+" never go back, so that damage costs no time.
FLAT = rb'[\[{](?:[^"\[\]{}]++|' + STRING + rb")*+[\]}]"
for _ in range(3):
    FLAT = rb'[\[{](?:[^"\[\]{}]++|' + STRING + rb"|" + FLAT + rb")*+[\]}]"
ELEMENT = re.compile(rb"\s*" + FLAT + rb"\s*", re.DOTALL)
BLANK = re.compile(rb"(?:\xef\xbb\xbf)?\s*")


class BrokenRecord(Exception):
    """A record that cannot be used; the message is the reason that goes to the quarantine list."""


class RecordFile(Sequence[Any]):
    """The records of a .jsonl file (one a line) or of any other file that is one JSON list; each is parsed when read.

    The ranges of bytes are mapped into memory, not loaded: 16 bytes a record on disk, none in the process.

    Args:
        path: the file.
        cache: folder of indices; this file's lies in a folder of its own, built at the first use.
        progress: called with the share of the file that has been read while the index is built.
    Raises:
        UserError: the file is missing, is no list of records, or is cut off.
    """

    def __init__(self, path: Path, cache: Path, progress: Progress | None = None) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such data file. Correct `records` of the stage's data.")
        self.path = path
        self.stamp = _stamp(path)
        self.folder = cache / f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
        with locked(self.folder / "lock"):
            if not self._is_current():
                self._build(progress)

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        """Parse one record; raises BrokenRecord if its bytes are not JSON."""
        start, end = (int(place) for place in self._ranges[index])
        with self.path.open("rb") as file:  # opened anew: safe in forked and spawned data workers
            file.seek(start)
            text = file.read(end - start)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BrokenRecord(f"not JSON ({error})") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_ranges"}

    @cached_property
    def _ranges(self) -> np.ndarray:
        """First byte and the one after the last of each record, int64 [n, 2]."""
        ranges: np.ndarray = np.load(self.folder / "ranges.npy", mmap_mode="r")
        return ranges

    def _is_current(self) -> bool:
        try:
            return bool(json.loads((self.folder / "stamp.json").read_text()) == self.stamp)
        except (OSError, ValueError):
            return False

    def _build(self, progress: Progress | None) -> None:
        places = array("q")
        if self.stamp["size"]:  # an empty file cannot be mapped
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                scan = _lines if self.path.suffix == ".jsonl" else _elements
                for place in scan(data, self.path, progress or (lambda share: None)):
                    places.extend(place)
        elif self.path.suffix != ".jsonl":
            raise _no_list(self.path, "nothing")
        (self.folder / "stamp.json").unlink(missing_ok=True)  # written last: an index with a stamp is whole
        save_array(self.folder / "ranges.npy", np.frombuffer(places, dtype=np.int64).reshape(-1, 2))
        write_atomic(self.folder / "stamp.json", json.dumps(self.stamp, indent=1))


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array as .npy so that a reader sees the old file or the new one, never a part."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_atomic(path, buffer.getvalue())


def _stamp(path: Path) -> dict[str, Any]:
    """What tells whether a file is the one that was indexed."""
    status = path.stat()
    with path.open("rb") as file:
        ends = file.read(HEAD)
        file.seek(max(0, status.st_size - HEAD))
        ends += file.read(HEAD)
    digest = hashlib.sha256(ends).hexdigest()
    return {"version": VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ends_sha256": digest}


def _lines(data: mmap.mmap, path: Path, progress: Progress) -> Iterator[tuple[int, int]]:
    """Ranges of the lines that are not blank; only a line feed ends a line: JSON strings may hold U+2028."""
    start = 0
    for chunk in range(0, len(data), CHUNK):
        block = np.frombuffer(data[chunk : chunk + CHUNK], dtype=np.uint8)
        for end in (np.flatnonzero(block == NEWLINE) + chunk).tolist():
            if data[start:end].strip():
                yield start, end
            start = end + 1
        progress(min(1.0, (chunk + CHUNK) / len(data)))
    if data[start:].strip():
        yield start, len(data)


def _elements(data: mmap.mmap, path: Path, progress: Progress) -> Iterator[tuple[int, int]]:
    """Ranges of the elements of the one list in a file, without parsing what is in them."""
    start = BLANK.match(data).end()  # type: ignore[union-attr]  # matches nothing, too
    if data[start : start + 1] != b"[":
        raise _no_list(path, _kind(data[start : start + 1]))
    ended, shown = False, start
    while not ended:
        start += 1  # after the bracket or the comma
        end = _element_end(data, start, path)
        ended = data[end] in CLOSE
        if not ended or data[start:end].strip():  # a list may end without an element
            yield start, end
        start = end
        if start - shown > CHUNK:
            shown = start
            progress(start / len(data))
    if data[start + 1 :].strip():
        raise _damaged(path, "something follows the list")


def _element_end(data: mmap.mmap, start: int, path: Path) -> int:
    """Where the comma or bracket after an element is."""
    whole = ELEMENT.match(data, start)
    if whole and data[whole.end() : whole.end() + 1] in (b",", b"]"):
        return whole.end()
    depth = 0
    for token in TOKEN.finditer(data, start):
        kind = data[token.start()]
        depth += (kind in OPEN) - (kind in CLOSE)
        if depth < 0 or (depth == 0 and kind == COMMA):
            return token.start()
    raise _damaged(path, "it ends within a record: it was cut off")


def _kind(first: bytes) -> str:
    names = {b"{": "an object (dict)", b'"': "a string", b"": "nothing"}
    return names.get(first, f"{first.decode(errors='replace')!r}")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: not JSON ({what}). A .jsonl file has one record a line, any other is one list of records; "
        "repair the file or copy it again."
    )


def _no_list(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: a list of records was expected, found {found}. Put the records into one list, "
        "or name a file with one record a line .jsonl."
    )
