"""In which order records come, and which of them share a batch or a row of one.

Every order is drawn from seed and epoch alone, the same in every process: a resumed run skips what was done and goes
on with the very batches that the straight run would have seen. Batches are dealt out to the processes in turn, as
accelerate does: batch i goes to process i modulo their number.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from distill.data.rows import Rows

WINDOW = 1024  # records that are packed together: more fill rows better, fewer keep an epoch's order more random


def sampler_for(rows: Rows, batch_size: int, batches_per_step: int, seed: int) -> Sampler[Any] | None:
    """The sampler of a stage's data; None for `random`: then the Trainer's own order holds.

    Args:
        rows: the stage's data.
        batch_size: rows of one batch.
        batches_per_step: batches that make up one step: processes times gradient accumulation.
        seed: of the order.
    """
    if rows.stage.data.batching == "random" or rows.lengths is None:
        return None
    if rows.stage.data.batching == "grouped":
        return GroupedSampler(rows.lengths, batch_size, batches_per_step, seed)
    return PackedSampler(np.abs(rows.lengths), rows.max_length, seed)


class EpochSampler(Sampler[Any]):
    """A sampler whose order depends on seed and epoch; accelerate calls `set_epoch` at the start of each."""

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, from 0."""
        self.epoch = epoch

    def generator(self) -> np.random.Generator:
        """A source of random numbers for this epoch."""
        return np.random.default_rng([self.seed, self.epoch])


class GroupedSampler(EpochSampler):
    """Steps of records of one modality, each step's batches of similar length; LLaVA's group_by_modality_length.

    Each modality is shuffled and cut into steps of `batch_size * batches_per_step` records; within a step the records
    are dealt to its batches, longest first, so that the batches, one a process, take about equally long. The steps are
    shuffled. What does not fill a step comes last, as in LLaVA; there a step may have both modalities.

    Args:
        lengths: int [n], embedding tokens; negative for text alone.
        batch_size: records of one batch.
        batches_per_step: batches of one optimiser step over all processes.
        seed: of the order.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, batches_per_step: int, seed: int) -> None:
        super().__init__(seed)
        self.lengths, self.batch_size, self.batches = lengths, batch_size, batches_per_step

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random, size = self.generator(), self.batch_size * self.batches
        steps: list[np.ndarray] = []
        rest: list[int] = []
        for chosen in (self.lengths > 0, self.lengths < 0):
            order = random.permutation(np.flatnonzero(chosen))
            full = len(order) // size * size
            steps += list(order[:full].reshape(-1, size))
            rest += sorted(order[full:].tolist(), key=lambda index: -abs(int(self.lengths[index])))
        for index in random.permutation(len(steps)):
            yield from self._dealt(steps[index])
        yield from rest

    def _dealt(self, step: np.ndarray) -> Iterator[int]:
        """A step's records, batch after batch: each record, longest first, goes to the shortest batch with room."""
        sizes = np.abs(self.lengths[step])
        batches: list[list[int]] = [[] for _ in range(self.batches)]
        filled = np.zeros(self.batches)
        for place in np.argsort(-sizes, kind="stable"):
            batch = int(filled.argmin())
            batches[batch].append(int(step[place]))
            filled[batch] = filled[batch] + sizes[place] if len(batches[batch]) < self.batch_size else np.inf
        for batch_records in batches:
            yield from batch_records


class PackedSampler(EpochSampler):
    """Tuples of records that share a row of a batch: each goes into the first row that has room for it.

    Records are shuffled once and packed in windows, longest first; an epoch shuffles the rows. So the number of rows
    is the same in every epoch.

    Args:
        lengths: int [n], embedding tokens, each at most max_length.
        max_length: most tokens of a row.
        seed: of the order.
    """

    def __init__(self, lengths: np.ndarray, max_length: int, seed: int) -> None:
        super().__init__(seed)
        order = np.random.default_rng(seed).permutation(len(lengths)).astype(np.int32)
        rows: list[np.ndarray] = []
        ends = [np.zeros(1, np.int64)]
        for start in range(0, len(order), WINDOW):
            window = order[start : start + WINDOW]
            window = window[np.argsort(-lengths[window], kind="stable")]
            row_of = first_fit(lengths[window], max_length)
            rows.append(window[np.argsort(row_of, kind="stable")])
            ends.append(start + np.cumsum(np.bincount(row_of)))
        self.records = np.concatenate(rows)  # of all rows, row after row
        self.ends = np.concatenate(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for row in self.generator().permutation(len(self)):
            yield tuple(self.records[self.ends[row] : self.ends[row + 1]].tolist())


def first_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """Which row each record goes to: the first, from 0, that still has room; int [n]."""
    free = np.full(len(lengths), room)
    row_of = np.empty(len(lengths), np.int64)
    for place, length in enumerate(lengths):
        row = int((free >= length).argmax())
        free[row] -= length
        row_of[place] = row
    return row_of
