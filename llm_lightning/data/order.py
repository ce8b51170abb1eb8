"""Which samples make up which batch: a pure function of (seed, epoch, position).

Nothing here remembers more than integers, so a run that was killed continues with exactly the batch it would have
seen, and the order does not depend on how many processes share the work: with W processes of batch size b, global
batch g holds samples g*W*b .. (g+1)*W*b - 1 of the epoch's order, and process r takes the r-th slice of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def epoch_order(n_samples: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The (n_samples,) int64 order in which epoch `epoch` visits the samples."""
    if not shuffle:
        return np.arange(n_samples)
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_samples)


class BatchOrder(Sampler[list[int]]):
    """Batches of sample indices for one process.

    Every process yields the same number of batches. The last ones may be short, and a process that has no sample
    left yields an empty batch (the collate function turns it into one without targets), so that no sample is ever
    repeated or skipped, whatever their number.

    Args:
        n_samples: size of the data set.
        batch_size: samples per batch and process.
        shuffle: a new order every epoch; otherwise 0..n-1.
        seed: of the shuffle.
        drop_last: leave out the samples that do not fill a whole global batch.
        rank, world_size: this process among all.
    """

    def __init__(
        self,
        n_samples: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        self.n_samples, self.batch_size, self.shuffle, self.seed = n_samples, batch_size, shuffle, seed
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls it before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, batches_done: int) -> None:
        """Make the next iteration begin behind the first `batches_done` batches of `epoch`."""
        self.epoch, self.start = epoch, batches_done

    def __len__(self) -> int:
        """Batches of a whole epoch, also when the next iteration begins in its middle."""
        per_step = self.batch_size * self.world_size
        return self.n_samples // per_step if self.drop_last else -(-self.n_samples // per_step)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.n_samples, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        start, self.start = self.start, 0
        for position in range(start, len(self)):
            first = (position * self.world_size + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()
