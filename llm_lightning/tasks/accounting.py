"""Sums and counts of an update, an epoch or an evaluation: exact means over items, whatever the batches and processes.

A metric of one batch is a pair (sum, count). Pairs are added up in float64, over all processes, and divided once.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

Totals = dict[str, list[float]]
"""name -> [sum, count]"""


class StepOutput(NamedTuple):
    """Loss and metrics of one micro-batch, as (sum, count)."""

    loss_sum: Tensor
    """() summed over `n_items` items."""
    n_items: int
    """Target tokens, sequences or pairs that the loss is divided by: a Python int, so that nothing waits for a GPU.

    A weighted loss is divided by their number, too, not by the sum of the weights.
    """
    metrics: dict[str, tuple[Tensor, Tensor]] = {}  # noqa: RUF012
    """name -> (sum, count): detached () tensors on the loss's device, over the items that this metric counts. `loss` is
    taken."""
    outputs: dict[str, Tensor] = {}  # noqa: RUF012
    """Rows that metrics of a whole evaluation need, such as logits and labels: (items, ...) each."""


class Sums:
    """The (sum, count) pairs of several batches."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, output: StepOutput) -> None:
        loss = output.loss_sum.detach()
        count = torch.tensor(float(output.n_items), device=loss.device)
        if "loss" in output.metrics:
            raise ValueError("a metric of StepOutput is called loss, which is the loss itself; give it another name")
        for name, (total, number) in {"loss": (loss, count), **output.metrics}.items():
            self._pairs[name].append(torch.stack([total.float(), number.float()]))

    def totals(self, trainer: L.Trainer) -> Totals:
        """Added up over all batches and processes."""
        sums = {name: torch.stack(pairs).cpu().double().sum(0) for name, pairs in self._pairs.items()}
        if trainer.world_size > 1 and sums:
            stacked = torch.stack(list(sums.values())).to(trainer.strategy.root_device)
            stacked = trainer.strategy.reduce(stacked, reduce_op="sum").cpu()
            sums = dict(zip(sums, stacked, strict=True))
        return {name: pair.tolist() for name, pair in sums.items()}


def averages(totals: Totals) -> dict[str, float]:
    return {name: total / (number or 1) for name, (total, number) in totals.items()}


class Accumulation:
    """The micro-batches whose gradients make up one optimizer update."""

    def __init__(self) -> None:
        self.clear()

    def __bool__(self) -> bool:
        return bool(self._samples)

    def clear(self) -> None:
        self.sums = Sums()
        self._samples: list[tuple[int, tuple[int, ...]]] = []

    def add(self, output: StepOutput, batch_idx: int, sample_ids: tuple[int, ...]) -> None:
        self.sums.add(output)
        self._samples.append((batch_idx, sample_ids))

    def describe(self) -> str:
        """The batches and samples in it, for error messages."""
        return ", ".join(f"batch {index} (samples {', '.join(map(str, ids))})" for index, ids in self._samples)


class EvaluationSums:
    """One evaluation of one split.

    Args:
        n_rows: expected rows of outputs on this process.
    """

    def __init__(self, n_rows: int) -> None:
        self.sums = Sums()
        self._outputs: dict[str, GrowingRows] = defaultdict(partial(GrowingRows, n_rows))

    def add(self, output: StepOutput) -> None:
        self.sums.add(output)
        for name, values in output.outputs.items():
            self._outputs[name].append(values.detach())

    def outputs(self, trainer: L.Trainer, local: frozenset[str]) -> dict[str, Tensor]:
        """The rows of all batches and processes; for the names in `local`, only those of this process."""
        return {
            name: rows.all() if name in local else gather_rows(trainer, rows.all())
            for name, rows in self._outputs.items()
        }


class GrowingRows:
    """The rows of many batches in one tensor on the CPU.

    A list of batches and its concatenation would exist at the same time, which doubles the memory; that matters where
    a row holds a logit for each of 10,000 classes.

    Args:
        expected: rows to allocate at first; the tensor grows when there are more.
    """

    def __init__(self, expected: int) -> None:
        self._expected, self._n = expected, 0
        self._rows = torch.empty(0)

    def append(self, rows: Tensor) -> None:
        end = self._n + len(rows)
        if end > len(self._rows) or rows.dtype != self._rows.dtype or rows.shape[1:] != self._rows.shape[1:]:
            room = torch.empty((max(self._expected, 2 * end), *rows.shape[1:]), dtype=rows.dtype)
            if self._n:
                room[: self._n] = self._rows[: self._n]
            self._rows = room
        self._rows[self._n : end] = rows
        self._n = end

    def all(self) -> Tensor:
        """(n, ...) every appended row."""
        return self._rows[: self._n]


def gather_rows(trainer: L.Trainer, rows: Tensor) -> Tensor:
    """The rows of every process, in the order of the processes. All of them call it together."""
    if trainer.world_size == 1:
        return rows
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, rows.contiguous())
    return torch.cat(everyone)
