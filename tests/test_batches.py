"""The order of records: every record once an epoch, the same in every process, batches alike, rows full."""

from pathlib import Path

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from distill.data.batches import GroupedSampler, PackedSampler, first_fit, sampler_for
from distill.data.quarantine import Quarantine
from distill.data.rows import Rows
from tests.llava_data import encoder, record, stage, write

LENGTHS = np.random.default_rng(0).integers(20, 500, 203) * np.where(np.arange(203) % 3, 1, -1)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_grouped_steps_have_one_modality_and_every_record_once(processes: int) -> None:
    sampler = GroupedSampler(LENGTHS, 4, processes, seed=1)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, 4, False), processes, rank)) for rank in range(processes)]
    size = 4 * processes
    full = (LENGTHS > 0).sum() // size + (LENGTHS < 0).sum() // size
    for step in range(full):
        records = [index for shard in shards for index in shard[step]]
        assert len({bool(LENGTHS[index] > 0) for index in records}) == 1
    assert sorted(sampler) == list(range(203)) and len(sampler) == 203
    assert {index for shard in shards for batch in shard for index in batch} == set(range(203))


def test_the_batches_of_a_grouped_step_are_about_equally_long() -> None:
    order = list(GroupedSampler(LENGTHS, 8, 4, seed=1))
    sums = np.abs(LENGTHS)[order[:160]].reshape(5, 4, 8).sum(2)  # 5 steps of 4 batches
    shuffled = np.abs(LENGTHS)[np.random.default_rng(1).permutation(203)[:160]].reshape(5, 4, 8).sum(2)
    assert (np.ptp(sums, axis=1) < np.ptp(shuffled, axis=1) / 2).all()


@pytest.mark.parametrize("make", [lambda seed: GroupedSampler(LENGTHS, 4, 2, seed),
                                  lambda seed: PackedSampler(np.abs(LENGTHS), 600, seed)])  # fmt: skip
def test_an_order_depends_on_seed_and_epoch_alone(make) -> None:  # type: ignore[no-untyped-def]
    first, again, other = make(1), make(1), make(2)
    epochs = []
    for epoch in (0, 1):
        first.set_epoch(epoch)
        again.set_epoch(epoch)
        epochs.append(list(first))
        assert epochs[-1] == list(again) and len(epochs[-1]) == len(first)
    assert epochs[0] != epochs[1] and epochs[0] != list(other)


def test_packed_rows_are_full_fit_and_hold_every_record_once() -> None:
    lengths = np.abs(LENGTHS)
    rows = list(PackedSampler(lengths, 600, seed=1))
    assert sorted(index for row in rows for index in row) == list(range(203))
    sums = [int(lengths[list(row)].sum()) for row in rows]
    assert max(sums) <= 600 and sum(sums) / (600 * len(rows)) > 0.95


def test_windows_are_packed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.batches.WINDOW", 50)
    rows = list(PackedSampler(np.abs(LENGTHS), 600, seed=1))
    assert sorted(index for row in rows for index in row) == list(range(203))


@given(st.lists(st.integers(1, 30), max_size=40))
def test_first_fit_takes_the_first_row_with_room(lengths: list[int]) -> None:
    free: list[int] = []
    expected = []
    for length in lengths:
        row = next((row for row, room in enumerate(free) if room >= length), len(free))
        free[row:] = [(free[row] if row < len(free) else 30) - length, *free[row + 1 :]]
        expected.append(row)
    assert first_fit(np.array(lengths, int), 30).tolist() == expected


def test_the_stages_data_choose_the_sampler(tmp_path: Path) -> None:
    write(tmp_path, [record(number, "a" * (number + 1), images=number % 2) for number in range(9)])
    made = {}
    for batching in ("random", "grouped", "packed"):
        rows = Rows(stage(tmp_path, batching=batching, max_length=400), encoder(), Quarantine(tmp_path, "s"))
        made[batching] = sampler_for(rows, 2, 1, 0)
    assert made["random"] is None
    assert isinstance(made["grouped"], GroupedSampler) and isinstance(made["packed"], PackedSampler)
    packed = rows.batch([rows[pack] for pack in made["packed"]])
    assert len(packed["keys"]) == 9 and packed["input_ids"].shape[1] <= 400
