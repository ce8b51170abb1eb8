"""How the samples of an update are shared among processes and micro-batches.

An update takes `batch_size` samples from each of `accumulated` micro-batches on each of `processes`. Its result depends
on their product alone, but for rounding and dropout, so a run may continue with another layout of as many samples.

Settings that count batches (`trainer.limit_*`, `trainer.val_check_interval`, `data.eval_batches`) and `data.drop_last`
depend on the size of a batch. It is `batch_size` x `processes`, or `data.global_batch_size` where that is set, and a
run keeps it: with another layout, these settings are converted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L

from llm_lightning.data.base import BaseDataModule

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """The shares of the samples of an update."""

    batch_size: int
    accumulated: int
    processes: int
    counted_batch: int
    """Samples of one batch, where settings count batches."""

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulated * self.processes

    def __str__(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.batch_size} x {self.accumulated} accumulated x {processes}"


def layout_of(trainer: L.Trainer, data: BaseDataModule) -> Layout:
    """The layout of a run."""
    processes = trainer.world_size
    return Layout(data.batch_size, trainer.accumulate_grad_batches, processes, data.samples_per_batch(processes))


def layout_before(header: Mapping[str, Any], processes: int) -> Layout | None:
    """The layout of a run that a checkpoint is of, also of an earlier version; None: the header does not say.

    Args:
        processes: those that wrote the checkpoint.
    """
    if "layout" in header:
        return Layout(**header["layout"])
    config = header.get("config", {})
    size = config.get("data", {}).get("batch_size")
    accumulated = config.get("trainer", {}).get("accumulate_grad_batches")
    if size is None or accumulated is None:
        return None
    return Layout(size, accumulated, processes, size * processes)


def share(trainer: L.Trainer, data: BaseDataModule, before: Layout | None = None) -> None:
    """Give the trainer and the data the layout that follows from `data.global_batch_size` and the processes.

    Args:
        before: the layout that a run had when it wrote the checkpoint that it continues from.

    Raises:
        ValueError: if the processes cannot share an update evenly, or an update would have other samples than before.
    """
    processes, total = trainer.world_size, data.global_batch_size
    if total is not None:
        size = micro_batch(total, processes, data.batch_size)
        if size != data.batch_size and trainer.is_global_zero:
            log.info(
                "data.batch_size=%d is %d here: the largest micro-batch that divides the %d samples of a process",
                data.batch_size, size, total // processes,
            )  # fmt: skip
        data.batch_size, trainer.accumulate_grad_batches = size, total // processes // size
    if before is not None:
        refuse_other_step(before, layout_of(trainer, data))
    counted = before.counted_batch if before is not None else total or data.batch_size * processes
    if counted != data.batch_size * processes and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _count_in_samples(trainer, data, counted)
    data.choose_measured(processes)


def micro_batch(total: int, processes: int, most: int) -> int:
    """The largest number of samples, up to `most`, that divides a process's share of `total` evenly.

    Raises:
        ValueError: if the processes cannot share `total` evenly; names the nearest numbers that they can.
    """
    own, rest = divmod(total, processes)
    if rest:
        nearest = [n for n in (own * processes, (own + 1) * processes) if n]
        raise ValueError(
            f"data.global_batch_size={total} cannot be shared evenly by {processes} processes; "
            f"set it to {' or '.join(map(str, nearest))}, or change trainer.devices"
        )
    return max(size for size in range(1, min(own, most) + 1) if own % size == 0)


def refuse_other_step(before: Layout, now: Layout) -> None:
    """Refuse to continue a run with updates of another size.

    Raises:
        ValueError: naming both numbers of samples and what to set.
    """
    if before.samples_per_step == now.samples_per_step:
        return
    total = before.samples_per_step
    size, rest = divmod(total, now.accumulated * now.processes)
    remedy = f"data.global_batch_size={total}" if not total % now.processes else "another number of processes"
    if not rest:
        remedy = f"data.batch_size={size} or {remedy}"
    raise ValueError(
        f"cannot resume: an update had {total} samples ({before}), here {now.samples_per_step} ({now}); set {remedy}"
    )


def _count_in_samples(trainer: L.Trainer, data: BaseDataModule, counted: int) -> None:
    """Convert what the trainer counts in batches of `counted` samples."""
    limits = {
        stage: limit
        for stage in ("train", "val", "test")
        if (limit := getattr(trainer, f"limit_{stage}_batches")) != 0  # switches the stage off
    }
    data.count_in_samples(counted, window=trainer.accumulate_grad_batches, limits=limits)
    for stage in limits:
        setattr(trainer, f"limit_{stage}_batches", 1.0)
    every = validation_every(trainer, -(-data.samples_per_epoch(trainer.world_size) // counted))
    if every is not None:
        # A run validates between two updates, so these are whole micro-batches of every layout.
        trainer.val_check_interval = every * counted // (data.batch_size * trainer.world_size)


def validation_every(trainer: L.Trainer, batches: int) -> int | None:
    """Batches between two validations; None: after each epoch, or by the clock.

    Args:
        batches: those of an epoch.
    """
    interval = getattr(trainer, "val_check_interval", None)  # the trainer has none where it is a time
    if isinstance(interval, int):
        return interval
    return None if interval in (None, 1.0) else max(1, int(batches * interval))
