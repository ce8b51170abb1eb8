"""The dataloaders, once: a data module names its samples, and this class makes exact, resumable batches of them."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from llm_lightning.data.files.bad_records import LISTED, POLICIES, BadRecord
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.mixture import Mixture
from llm_lightning.data.order import BatchOrder, bucketed_order, limited, spread_sample
from llm_lightning.data.workers import Loader, are_forked, begin_with
from llm_lightning.terminal import counted
from llm_lightning.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

Limit = int | float | None
"""Of the batches that are used: a number, a share, or None for all."""


class BaseDataModule(L.LightningDataModule):
    """Builds the loaders of `train_samples` and `eval_samples`.

    Subclasses fill these in `build` and override `collator`:

    - `tokenizer`
    - `train_samples`: a map-style Dataset of samples
    - `eval_samples`: stage name (`val`, `train_eval`) to Dataset, in the order they are evaluated
    - `test_samples`: the same for what is evaluated once, at the end, with the best weights
    - `data_digest`: identifies the data, for lineage
    - `mixture`: which of the training samples an epoch takes, where they come from several sources by weight
    - `quarantined`: the records that were left out because they could not be read

    Args:
        batch_size: samples per process and micro-batch; with `global_batch_size`, at most.
        global_batch_size: samples per update over all processes and micro-batches, see `tasks/layout.py`; None: follows
            from `batch_size`.
        num_workers: loader processes; 0 is fastest for memory-mapped tokens.
        shuffle: a new order of the training samples every epoch.
        drop_last: drop the last samples of an epoch if they do not fill a batch.
        bucket: batches of similar length instead of a plain shuffle; the samples then have `n_tokens`.
        eval_batches: number of training batches, of all processes together, that are evaluated, without dropout, for
            `train/eval_loss`.
        seed: of the shuffle.
        format, encoding, separator, header, quotes, newlines: how files are read; see `FileOptions`.
        bad_records: what happens to records that cannot be read: `refuse`, or `quarantine` (they are left out).
        verify: read and hash files again even where path, size, time and inode say that they are as before.
    """

    tokenizer: Tokenizer
    train_samples: Dataset
    eval_samples: dict[str, Dataset]
    test_samples: dict[str, Dataset]
    data_digest: str
    samples_are: ClassVar[str] = "samples"
    """What messages call them."""

    def __init__(
        self,
        *,
        batch_size: int,
        global_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        bucket: bool = False,
        eval_batches: int = 8,
        seed: int = 0,
        format: str | None = None,
        encoding: str = "utf-8",
        separator: str | None = None,
        header: bool = True,
        quotes: bool | None = None,
        newlines: str = "lf",
        bad_records: str = "refuse",
        verify: bool = False,
    ) -> None:
        super().__init__()
        self.verify = verify
        if bad_records not in POLICIES:
            raise ValueError(f"data.bad_records={bad_records!r} must be {' or '.join(POLICIES)}")
        self.bad_records_policy, self.quarantined = bad_records, list[BadRecord]()
        self.file_options = FileOptions(format, encoding, separator, header, quotes, newlines)
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        if global_batch_size is not None and global_batch_size < 1:
            raise ValueError(f"data.global_batch_size={global_batch_size} must be at least 1")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.global_batch_size = global_batch_size
        self.counted_batch: int | None = None
        self._window, self._limits = 1, dict[str, Limit]()
        self._also_measured: Dataset | None = None
        self.shuffle, self.drop_last, self.bucket = shuffle, drop_last, bucket
        self.eval_batches, self.seed = eval_batches, seed
        self.test_samples = {}
        self.mixture: Mixture | None = None
        self._train_order: BatchOrder | None = None
        self._lengths: WeakKeyDictionary[Dataset, tuple[np.ndarray, np.ndarray]] = WeakKeyDictionary()
        self._resume_at = (0, 0)

    @abstractmethod
    def build(self) -> None:
        """Read, check and tokenise the data. Called once, before the model is built: it needs the vocabulary."""

    def collator(self) -> Callable[[Sequence[Any]], Any]:
        """The function that turns samples of one micro-batch, possibly none, into a named batch.

        Subclasses return a module-level function with plain values bound to it: a loader process that is not forked
        gets a copy, and a method would take the data and the trainer along.
        """
        return self.collate

    def collate(self, samples: Sequence[Any]) -> Any:
        """The batch of these samples. May be overridden instead of `collator` where loader processes are forked."""
        return self.collator()(samples)

    @abstractmethod
    def preview(self, n: int) -> str:
        """The first `n` training samples as readable text."""

    @abstractmethod
    def describe(self) -> str:
        """The training data in one line."""

    def report(self) -> dict[str, Any]:
        """Facts about the data for `summary.json`, as plain values. Subclasses may override."""
        return {}

    def say_quarantined(self) -> None:
        """Print how many records were left out because they could not be read, and the first of them."""
        if self.quarantined:
            shown = "; ".join(f"{place}: {reason}" for place, reason in self.quarantined[:LISTED])
            which = f" (the first {LISTED})" if len(self.quarantined) > LISTED else ""
            number = counted(len(self.quarantined), "bad record")
            log.warning("%s left out (data.bad_records=quarantine)%s: %s", number, which, shown)

    def digest_of_source(self) -> str | None:
        """`data_digest` without building anything, where that is cheaper; else None. May be overridden."""
        return None

    def class_of(self, sample: Any) -> int:
        """The class of a sample: bucketed batches keep the proportion of classes. May be overridden."""
        return 0

    def order_of(self, samples: Dataset, *, is_training: bool) -> Callable[[int], np.ndarray] | None:
        """epoch -> the order of `samples`; None: shuffled for training, else unchanged.

        Lengths are measured when an order is first needed, once per data set: counting batches needs none.
        """
        if is_training and self.mixture is not None:
            return partial(self._mixed_order, self.mixture, samples)
        if not self.bucket or (is_training and not self.shuffle):
            return None
        if not is_training:
            return lambda epoch: np.argsort(self._measured(samples)[0], kind="stable")
        return lambda epoch: bucketed_order(*self._measured(samples), seed=self.seed, epoch=epoch)

    def _mixed_order(self, mixture: Mixture, samples: Dataset, epoch: int) -> np.ndarray:
        """The order of an epoch of a mixture."""
        chosen = mixture.chosen(epoch)
        if not self.bucket or not self.shuffle:
            return chosen
        lengths, classes = self._measured(samples)
        return chosen[bucketed_order(lengths[chosen], classes[chosen], seed=self.seed, epoch=epoch)]

    def taken_per_source(self, epoch: int, batches_done: int, world_size: int) -> dict[str, int]:
        """name -> how many samples of each source of a mixture the first batches of `epoch` took; else empty."""
        if self.mixture is None:
            return {}
        order = self.order_of(self.train_samples, is_training=True)
        assert order is not None
        done = min(batches_done * self.batch_size * world_size, self._train_batches(world_size).n_used)
        taken = order(epoch)[:done]
        counts = np.bincount(self.mixture.source_of(taken), minlength=len(self.mixture.names))
        return dict(zip(self.mixture.names, counts.tolist(), strict=True))

    def _measured(self, samples: Any) -> tuple[np.ndarray, np.ndarray]:
        """The number of tokens and the class of every sample, (n,) int64 each."""
        if samples not in self._lengths:
            known = _known_lengths(samples)
            if known is not None:
                self._lengths[samples] = known, np.zeros(len(known), np.int64)
                return self._lengths[samples]
            rows = [samples[index] for index in range(len(samples))]
            pairs = [(row.n_tokens, self.class_of(row)) for row in rows]
            lengths, classes = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
            self._lengths[samples] = lengths, classes
        return self._lengths[samples]

    def train_dataloader(self) -> DataLoader:
        self._train_order = self._train_batches()
        self._train_order.resume(*self._resume_at)
        return self._loader(self.train_samples, self._train_order)

    def count_in_samples(self, counted_batch: int, *, window: int, limits: Mapping[str, Limit]) -> None:
        """Count the batches of settings in samples, so that an epoch and a limit do not depend on the micro-batches.

        Args:
            counted_batch: samples of one batch, where settings count batches.
            window: micro-batches per update.
            limits: `train`, `val`, `test` -> the trainer's limit, which this module then keeps instead.
        """
        self.counted_batch, self._window, self._limits = counted_batch, window, dict(limits)

    def samples_per_batch(self, world_size: int) -> int:
        """The samples of one batch on all processes, where settings count batches."""
        return self.counted_batch or self.batch_size * world_size

    def measure_training(self, samples: Dataset) -> None:
        """Evaluate `eval_batches` of the training samples, spread over all, as `train_eval`."""
        self._also_measured = samples
        self.choose_measured(1)

    def choose_measured(self, world_size: int) -> None:
        """Choose the training samples that are evaluated, the same for any processes that share as many per batch."""
        if self._also_measured is not None and self.eval_batches > 0:
            n = self.eval_batches * self.samples_per_batch(world_size)
            self.eval_samples["train_eval"] = evenly_spaced(self._also_measured, n)

    def val_dataloader(self) -> list[DataLoader]:
        return [self._eval_loader(samples, "val") for samples in self.eval_samples.values()]

    def test_dataloader(self) -> list[DataLoader]:
        return [self._eval_loader(samples, "test") for samples in self.test_samples.values()]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming epoch."""
        if self._train_order is not None:
            self._train_order.set_epoch(epoch)

    def resume(self, epoch: int, batches_done: int) -> None:
        """Continue after the first `batches_done` batches of `epoch`. Takes effect when the loader is made."""
        self._resume_at = (epoch, batches_done)

    def expected_samples(self, epoch: int, batch: int) -> tuple[int, ...]:
        """The indices in `train_samples` of batch number `batch` of this process in `epoch`, computed afresh."""
        order = self._train_batches()
        order.resume(epoch, batch)
        return tuple(next(iter(order)))

    def batches_per_epoch(self, world_size: int) -> int:
        """Number of micro-batches that each process sees in one epoch."""
        batches = len(self._train_batches(world_size=world_size))
        if batches == 0:
            size = f"data.batch_size={self.batch_size} on {world_size} process(es)"
            if self.counted_batch:
                size = f"data.global_batch_size={self.counted_batch}"
            raise ValueError(
                f"{len(self.train_samples)} training samples do not fill one batch of {size}; "  # type: ignore[arg-type]
                "lower it, or set data.drop_last=false"
            )
        return batches

    def samples_per_epoch(self, world_size: int) -> int:
        """Number of samples that all processes together see in one epoch."""
        return self._train_batches(world_size=world_size).n_used

    def first_batches(self, most: int) -> Iterator[list[Any]]:
        """The samples of the first `most` training batches of a single process."""
        samples: Any = self.train_samples
        order = self.order_of(samples, is_training=True)
        batches = BatchOrder(len(samples), self.batch_size, shuffle=self.shuffle, seed=self.seed, order=order)
        for indices in islice(batches, most):
            yield [samples[index] for index in indices]

    def all_samples(self) -> list[Any]:
        """Every sample of every split; one that is in several splits occurs once in each."""
        splits: list[Any] = [self.train_samples, *self.eval_samples.values(), *self.test_samples.values()]
        return [split[index] for split in splits for index in range(len(split))]

    def _train_batches(self, world_size: int | None = None) -> BatchOrder:
        samples: Any = self.train_samples
        order = self._order(
            samples,
            order=self.order_of(samples, is_training=True),
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            world_size=world_size,
            unit=self.counted_batch,
            window=self._window,
        )
        if "train" in self._limits:
            order.limit = self._within("train", order.n_used, order.world_size, self._limits["train"])
        return order

    def _within(self, stage: str, n_samples: int, world_size: int, limit: Limit) -> int:
        """How many of `n_samples` are used within a limit in batches."""
        size = self.samples_per_batch(world_size)
        batches = -(-n_samples // size)
        if batches and limit and not limited(batches, limit):
            raise ValueError(
                f"trainer.limit_{stage}_batches={limit} leaves none of {batches} batches of {size} samples; raise it"
            )
        return min(n_samples, limited(batches, limit) * size)

    def _eval_loader(self, samples: Any, stage: str) -> DataLoader:
        """A loader of `samples`; within a limit, only the first batches are read, which are a fair sample."""
        order = self._order(samples)
        limit = None if self.trainer is None else getattr(self.trainer, f"limit_{stage}_batches")
        measured = self._within(stage, len(samples), order.world_size, self._limits.get(stage, limit))
        if stage in self._limits:
            order.limit = measured
        if measured in (0, len(samples)):
            order.order = self.order_of(samples, is_training=False)
            return self._loader(samples, order)
        # In the order of evaluation the first batches would be the shortest samples.
        chosen = spread_sample(len(samples), measured)
        within = self.order_of(Subset(samples, chosen.tolist()), is_training=False)
        others = np.setdiff1d(np.arange(len(samples)), chosen)
        order.order = lambda epoch: np.concatenate([chosen if within is None else chosen[within(epoch)], others])
        return self._loader(samples, order)

    def sampled(self, trainer: L.Trainer) -> dict[str, dict[str, Any]]:
        """split -> how many samples are evaluated, and of how many, where the limits of `trainer` leave some out."""
        limited_splits = {}
        own = [split for split in self.eval_samples if split != "train_eval"]
        stages = dict.fromkeys(own, "val") | dict.fromkeys(self.test_samples, "test")
        for split, stage in stages.items():
            samples: Any = {**self.eval_samples, **self.test_samples}[split]
            limit = self._limits.get(stage, getattr(trainer, f"limit_{stage}_batches"))
            measured = self._within(stage, len(samples), trainer.world_size, limit)
            if measured < len(samples):
                limited_splits[split] = {"measured": measured, "of": len(samples), "what": self.samples_are}
        return limited_splits

    def _order(self, samples: Any, *, world_size: int | None = None, **options: Any) -> BatchOrder:
        options = {"shuffle": False, "seed": self.seed, **options}
        rank = 0 if self.trainer is None else self.trainer.global_rank
        if world_size is None:
            world_size = 1 if self.trainer is None else self.trainer.world_size
        return BatchOrder(len(samples), self.batch_size, rank=rank, world_size=world_size, **options)

    def _loader(self, samples: Dataset, order: BatchOrder) -> DataLoader:
        return Loader(
            samples,
            batch_sampler=order,
            collate_fn=self.collator(),
            num_workers=self.num_workers,
            worker_init_fn=begin_with(),
            persistent_workers=self.num_workers > 0 and not are_forked(),  # others take seconds to start
            # Pinning takes a part of the GPU, which a run on the CPU leaves alone.
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # A DataLoader without its own generator draws from the global RNG at every epoch, so that dropout would
            # depend on how often the loader was made. Workers are seeded from it, differently on each rank.
            generator=torch.Generator().manual_seed(self.seed + order.rank),
        )


def _known_lengths(samples: Any) -> np.ndarray | None:
    """The lengths of samples that know them without being read: (n,) int64, all of one class."""
    if isinstance(samples, Subset):
        inner = _known_lengths(samples.dataset)
        return None if inner is None else inner[np.asarray(samples.indices)]
    return np.asarray(samples.lengths, np.int64) if hasattr(samples, "lengths") else None


def evenly_spaced(samples: Dataset, n: int) -> Subset:
    """A fixed subset of `n` samples (or all) spread over the whole data set."""
    size = len(samples)  # type: ignore[arg-type]
    return Subset(samples, np.unique(np.linspace(0, size - 1, min(n, size)).astype(int)).tolist())
