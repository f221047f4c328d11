"""LLaVA-format records of many files as one sequence; what is too long or broken is left out and counted."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.collator import Encoder
from vlm.data.index import BrokenRecord, RecordFile, save_array
from vlm.data.llava import llava_record
from vlm.data.records import Record
from vlm.folders import locked, write_atomic
from vlm.machine import cores

Progress = Callable[[str, float], None]  # what is being done, and the share done from 0 to 1

VERSION = 2  # of how records are measured; another number measures anew
BATCH = 4096  # records measured in one go
ALONE = 5 * BATCH  # up to so many records starting other processes costs more than it saves
LOOKED_AT = 100  # images of a file that are looked for before the training


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used: name of its part, place in the file, id or image path if known, and the reason."""

    part: str
    record: int
    path: str
    reason: str


class MeasuredFile:
    """One records file, its image folder, and the length of each record in embedding tokens.

    Args:
        name: of the part.
        path, images: the records file and the folder its image paths begin at.
        encoder, template: how a record becomes tokens; image placeholders count as the vision tokens they stand for.
        cache: folder of what is kept: the index of the file, and the lengths for each tokenizer and template.
        progress: is told what is being done.
    Attributes:
        lengths: int32 [n], mapped into memory; negative for text alone (as LLaVA's modality lengths), 0 if broken.
        broken: the records that are no conversation, with the reason.
    """

    def __init__(
        self, name: str, path: Path, images: Path, encoder: Encoder, template: str, cache: Path, progress: Progress
    ) -> None:
        self.name, self.images, self.template = name, images, template
        self.records = RecordFile(path, cache, lambda share: progress(f"{name}: finding the records", share))
        key = [VERSION, self.records.stamp, encoder.identity(), template]
        folder = self.records.folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        with locked(folder / "lock"):
            if not (folder / "lengths.npy").is_file():
                self._measure(folder, encoder, progress)
        self.lengths: np.ndarray = np.load(folder / "lengths.npy", mmap_mode="r")
        rows = json.loads((folder / "broken.json").read_text())
        self.broken = [Broken(name, number, "", reason) for number, reason in rows]

    def __getitem__(self, number: int) -> Record:
        """The record at a place in the file; raises BrokenRecord."""
        return llava_record(self.records[number], number, self.images, self.template)

    def images_not_found(self) -> tuple[int, list[str]]:
        """How many images of LOOKED_AT records spread over the file were looked for, and those that are not there."""
        with_image = np.flatnonzero(self.lengths > 0)
        chosen = with_image[np.linspace(0, len(with_image) - 1, min(LOOKED_AT, len(with_image))).astype(np.int64)]
        images = [image for number in chosen for image in self[int(number)].images]
        return len(images), [image for image in images if not os.path.isfile(image)]  # no error for a long name

    def _measure(self, folder: Path, encoder: Encoder, progress: Progress) -> None:
        count, processes = len(self.records), cores()
        size = BATCH if count <= ALONE else max(BATCH, -(-count // (8 * processes)))
        jobs = [(self.records, self.template, encoder, start, size) for start in range(0, count, size)]
        lengths, broken = [np.zeros(0, np.int32)], []
        with _mapper(count, processes) as each:
            for done, (part, wrong) in enumerate(each(_measure_batch, jobs), 1):
                lengths.append(part)
                broken += wrong
                progress(f"{self.name}: measuring the records", done / len(jobs))
        write_atomic(folder / "broken.json", json.dumps(broken))
        save_array(folder / "lengths.npy", np.concatenate(lengths))  # written last: where it is, all is


Job = tuple[RecordFile, str, Encoder, int, int]


def _measure_batch(job: Job) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Lengths of some records from a place on, and (place, reason) of the broken ones."""
    records, template, encoder, start, size = job
    numbers = range(start, min(start + size, len(records)))
    lengths, broken = np.zeros(len(numbers), np.int32), []
    for place, number in enumerate(numbers):
        try:
            record = llava_record(records[number], number, Path(), template)
        except BrokenRecord as error:
            broken.append((number, str(error)))
            continue
        length = encoder.length(record)
        lengths[place] = length if record.images else -length
    return lengths, broken


@contextmanager
def _mapper(count: int, processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` for so many records: in this process, or in as many as there are cores."""
    if count <= ALONE or processes == 1:
        yield map
        return
    # Spawned, not forked: a fork of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield pool.map


class Conversations(Sequence[Record]):
    """The records of several files that are whole and fit, in order; 8 bytes each in memory.

    Args:
        files: the measured files.
        max_length: longest record in embedding tokens; longer ones are left out, never cut.
    Attributes:
        lengths: int32 [n], embedding tokens of each record; negative for text alone.
        total: number of records of the files.
        too_long: how many records each part lost to `max_length`.
        broken: the records that are no conversation.
    """

    def __init__(self, files: list[MeasuredFile], max_length: int) -> None:
        self.files, self.max_length = files, max_length
        fits = [(file.lengths != 0) & (np.abs(file.lengths) <= max_length) for file in files]
        self._numbers = np.concatenate([np.flatnonzero(fit).astype(np.int32) for fit in fits])
        self._ends = np.cumsum([int(fit.sum()) for fit in fits])
        self.lengths = np.concatenate([file.lengths[fit] for file, fit in zip(files, fits, strict=True)])
        self.total = sum(len(file.lengths) for file in files)
        self.too_long = {file.name: int((np.abs(file.lengths) > max_length).sum()) for file in files}
        self.broken = [broken for file in files for broken in file.broken]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        file, number = self._place(index)
        return file[number]

    def place(self, index: int) -> tuple[str, int]:
        """Name of the part and place in its file of a record."""
        file, number = self._place(index)
        return file.name, number

    def _place(self, index: int) -> tuple[MeasuredFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.files[int(np.searchsorted(self._ends, index, side="right"))], int(self._numbers[index])
