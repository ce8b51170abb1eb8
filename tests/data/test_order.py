"""Batch order: pure, complete, independent of the number of processes, resumable."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.order import BatchOrder, bucketed_order, epoch_order
from llm_lightning.data.samples import Rows


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    first = epoch_order(100, seed=1, epoch=0, shuffle=True)
    assert sorted(first) == list(range(100))
    assert np.array_equal(first, epoch_order(100, seed=1, epoch=0, shuffle=True))
    assert not np.array_equal(first, epoch_order(100, seed=1, epoch=1, shuffle=True))
    assert not np.array_equal(first, epoch_order(100, seed=2, epoch=0, shuffle=True))
    assert list(epoch_order(3, seed=1, epoch=0, shuffle=False)) == [0, 1, 2]


@pytest.mark.parametrize("n_samples", [1, 7, 8, 22])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_once_whatever_the_number_of_processes(n_samples: int, world_size: int) -> None:
    orders = [
        BatchOrder(n_samples, 2, shuffle=True, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    batches = [list(order) for order in orders]
    assert {len(rank) for rank in batches} == {len(orders[0])}
    together = [[sample for rank in batches for sample in rank[step]] for step in range(len(orders[0]))]
    one = BatchOrder(n_samples, 2 * world_size, shuffle=True, seed=3)
    assert together == list(one)
    assert sorted(sample for batch in together for sample in batch) == list(range(n_samples))


def test_drop_last_leaves_out_what_fills_no_global_batch() -> None:
    order = BatchOrder(22, 2, shuffle=False, drop_last=True, rank=1, world_size=2)
    assert len(order) == 5
    assert list(order)[-1] == [18, 19]


@pytest.mark.parametrize("done", [0, 1, 10, 11])
def test_resume_continues_behind_the_finished_batches(done: int) -> None:
    order = BatchOrder(22, 2, shuffle=True, seed=3)
    order.set_epoch(4)
    whole = list(order)
    resumed = BatchOrder(22, 2, shuffle=True, seed=3)
    resumed.resume(4, done)
    resumed.set_epoch(4)  # as Lightning does when the epoch starts
    assert len(resumed) == 11
    assert list(resumed) == whole[done:]
    resumed.set_epoch(5)
    assert len(list(resumed)) == 11


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"data.batch_size=0"):
        BatchOrder(10, 0, shuffle=False)


class Sized(NamedTuple):
    n_tokens: int


class CountingRows(Rows):
    """Counts how often a sample is read."""

    n_reads = 0

    def __getitem__(self, index: int) -> Sized:
        self.n_reads += 1
        return super().__getitem__(index)


class Bucketed(BaseDataModule):
    def build(self) -> None:
        draw = np.random.default_rng(0)
        self.train_samples = CountingRows([Sized(int(n)) for n in draw.integers(1, 50, 100)])
        self.eval_samples = {"val": CountingRows([Sized(int(n)) for n in draw.integers(1, 50, 30)])}

    def preview(self, n: int) -> str:
        return ""

    def describe(self) -> str:
        return ""


@pytest.mark.parametrize("bucket", [False, True])
def test_the_seed_of_a_data_module_decides_its_order(bucket: bool) -> None:
    orders = []
    for seed in (1, 1, 2):
        data = Bucketed(batch_size=8, bucket=bucket, seed=seed)
        data.build()
        orders.append([data.expected_samples(0, batch) for batch in range(13)])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_lengths_are_measured_once_and_only_for_an_order() -> None:
    data = Bucketed(batch_size=8, bucket=True)
    data.build()
    train, val = data.train_samples, data.eval_samples["val"]
    assert isinstance(train, CountingRows)
    assert isinstance(val, CountingRows)
    assert [data.batches_per_epoch(world_size) for world_size in (1, 2, 1)] == [13, 7, 13]
    [validation] = data.val_dataloader()
    assert (train.n_reads, val.n_reads) == (0, 0), "nothing is measured to count batches, nor to make a loader"
    orders = []
    for epoch in range(2):
        loader = data.train_dataloader()
        data.set_epoch(epoch)
        orders.append([index for batch in loader.batch_sampler for index in batch])  # type: ignore[union-attr]
        data.expected_samples(epoch, 3)
    read_for_batches = sum(len(batch) for batch in data.first_batches(2))
    assert train.n_reads == 100 + read_for_batches
    lengths = [row.n_tokens for row in train.rows]
    for epoch, order in enumerate(orders):
        assert order == bucketed_order(lengths, [0] * 100, seed=0, epoch=epoch).tolist()
    for _ in range(2):
        evaluated = [index for batch in validation.batch_sampler for index in batch]  # type: ignore[union-attr]
        assert [val.rows[index].n_tokens for index in evaluated] == sorted(row.n_tokens for row in val.rows)
    assert val.n_reads == 30
