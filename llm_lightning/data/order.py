"""Which samples make up which batch: a pure function of (seed, epoch, position).

Nothing here remembers more than integers, so a run that was killed continues with exactly the batch it would have
seen, and the order does not depend on how many processes share the work: with W processes of batch size b, global
batch g holds samples g*W*b .. (g+1)*W*b - 1 of the epoch's order, and process r takes the r-th slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


def epoch_order(n_samples: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The (n_samples,) int64 order in which epoch `epoch` visits the samples."""
    if not shuffle:
        return np.arange(n_samples)
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_samples)


BUCKET = 32
"""Samples of similar length in a row; a batch of 1, 2, 4 ... 32 lies within one bucket."""
POOL = 8 * BUCKET
"""Samples sorted by length together: with fewer, batches pad more; with more, all epochs have the same batches."""


def bucketed_order(
    lengths: Sequence[int] | np.ndarray, classes: Sequence[int] | np.ndarray, *, seed: int, epoch: int
) -> np.ndarray:
    """Order samples so that a batch has similar lengths within each class, and classes in their overall proportion.

    Classes differ in length (spam is twice as long as other messages), so that sorting all samples together would give
    batches of one class. The order does not depend on the batch size.

    Args:
        lengths, classes: of each sample.

    Returns:
        (n,) int64.
    """
    draw = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    size, kind = np.asarray(lengths), np.asarray(classes)
    shuffled = draw.permutation(len(size))
    mixed = shuffled[_interleave(kind[shuffled], np.arange(len(size)))]
    whole = len(mixed) // BUCKET * BUCKET
    buckets = []
    for start in range(0, whole, POOL):
        pool = mixed[start : min(start + POOL, whole)]
        by_length = pool[_interleave(kind[pool], size[pool])]
        for bucket in by_length.reshape(-1, BUCKET):
            shuffled = draw.permutation(bucket)
            buckets.append(shuffled[_interleave(kind[shuffled], np.arange(BUCKET))])
    order = [buckets[index] for index in draw.permutation(len(buckets))]
    return np.concatenate([*order, mixed[whole:]]).astype(np.int64)


def _interleave(kind: np.ndarray, rank_by: np.ndarray) -> np.ndarray:
    """Sort each class by `rank_by`, then merge the classes so that every stretch holds them in their proportion."""
    # One sort, by class and then by rank, whatever the number of classes.
    by_class = np.lexsort((rank_by, kind))  # stable
    _, starts, counts = np.unique(kind[by_class], return_index=True, return_counts=True)
    ranks = np.arange(len(kind)) - np.repeat(starts, counts)
    place = np.zeros(len(kind))
    place[by_class] = (ranks + 0.5) / np.repeat(counts, counts)
    return np.argsort(place, kind="stable")


class BatchOrder(Sampler[list[int]]):
    """Batches of sample indices for one process.

    Every process yields the same number of batches. The last ones may be short, and a process without samples left
    yields an empty batch (the collate function makes it one without targets), so that no sample is ever repeated or
    skipped. `limit`, `unit` and `window` are counts of samples and batches that do not depend on `batch_size` and
    `world_size`: with them an epoch has the same samples and updates however they are shared.

    Args:
        n_samples: size of the data set.
        batch_size: samples per batch and process.
        shuffle: a new order every epoch; otherwise 0..n-1.
        seed: of the shuffle.
        order: epoch -> the order of its samples, instead of a shuffle.
        drop_last: leave out the samples that do not fill `unit`.
        rank, world_size: this process among all.
        limit: the most samples of an epoch.
        unit: samples; default: those of one batch on all processes.
        window: the number of batches of an epoch is a multiple of it; the last ones may be empty on all processes.
    """

    def __init__(
        self,
        n_samples: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        order: Callable[[int], np.ndarray] | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        unit: int | None = None,
        window: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        self.n_samples, self.batch_size, self.shuffle, self.seed = n_samples, batch_size, shuffle, seed
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self.order = order
        self.limit, self.unit, self.window = limit, unit, window
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls it before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, batches_done: int) -> None:
        """Start the next iteration after the first `batches_done` batches of `epoch`."""
        self.epoch, self.start = epoch, batches_done

    @property
    def n_used(self) -> int:
        """Samples of a whole epoch."""
        used = self.n_samples if self.limit is None else min(self.n_samples, self.limit)
        unit = self.unit or self.batch_size * self.world_size
        return used // unit * unit if self.drop_last else used

    def __len__(self) -> int:
        """Batches of a whole epoch, even when the next iteration starts in its middle."""
        return -(-self.n_used // (self.batch_size * self.world_size * self.window)) * self.window

    def __iter__(self) -> Iterator[list[int]]:
        if self.order is not None:
            order = self.order(self.epoch)
        else:
            order = epoch_order(self.n_samples, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        start, self.start = self.start, 0
        for position in range(start, len(self)):
            first = (position * self.world_size + self.rank) * self.batch_size
            yield order[first : min(first + self.batch_size, self.n_used)].tolist()


def limited(n_batches: int, limit: int | float | None) -> int:
    """How many of `n_batches` Lightning runs within a limit: a number of batches, a fraction, or None for all."""
    if limit is None:
        return n_batches
    return min(n_batches, limit) if isinstance(limit, int) else int(n_batches * limit)


def spread_sample(n_samples: int, n_chosen: int) -> np.ndarray:
    """Choose `n_chosen` indices of `n_samples`: one from each of as many equal stretches, ascending.

    The draw within a stretch is fixed. Even spacing would always meet the same kind where records alternate.
    """
    edges = np.arange(n_chosen + 1) * n_samples // n_chosen
    draw = np.random.Generator(np.random.Philox(key=[n_samples, n_chosen])).random(n_chosen)
    return edges[:-1] + (draw * np.diff(edges)).astype(np.int64)
