"""Whether a trial goes on: each validation of its jobs is judged once, in the order of `metrics.csv`.

A judgement depends on the values so far and on the trials of earlier batches, never on when it is made: after a kill,
the same rows give the same judgements, so nothing needs to be kept of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from llm_lightning.files.metrics_csv import column

METRICS = "metrics.csv"


class Pruner(Protocol):
    """Says whether a trial with these values ends: validation, from 1 over all jobs of the trial -> value."""

    def __call__(self, values: dict[int, float]) -> bool: ...


class Judge:
    """Judges the validations of one trial, whose jobs differ in their seed and run one after the other.

    The value at a validation is what the trial's value would be if it ended there: the mean of the best values of the
    jobs so far.
    """

    def __init__(self, better: Callable[[Sequence[float]], float], prunes: Pruner) -> None:
        """Prepare; the jobs follow by `begin_job` and `judge`.

        Args:
            better: `min` or `max`.
        """
        self.better, self.prunes = better, prunes
        self.values: dict[int, float] = {}
        self.best_of_jobs: list[float | None] = []
        self.is_pruned = False
        self._validations = 0
        self._of_job = 0

    def begin_job(self) -> None:
        """Continue with the next job, from its first row."""
        self.best_of_jobs.append(None)
        self._of_job = 0

    def judge(self, rows: Sequence[float]) -> bool:
        """Judge those of the job's rows that are new; return whether the trial is pruned.

        Args:
            rows: the monitored metric at each validation of the job, from the first. Rows that follow a decision
                do not count.
        """
        for value in rows[self._of_job :]:
            if self.is_pruned:
                break
            self._of_job += 1
            self._validations += 1
            self._judge(value)
        return self.is_pruned

    def _judge(self, value: float) -> None:
        best = self.best_of_jobs[-1]
        if math.isfinite(value):
            self.best_of_jobs[-1] = best = value if best is None else self.better([best, value])
        if best is not None:
            self.values[self._validations] = self.value()
            self.is_pruned = self.prunes(dict(self.values))

    def value(self) -> float:
        """The mean of the best values of the jobs so far."""
        known = [best for best in self.best_of_jobs if best is not None]
        return math.fsum(known) / len(known)


def validations(folder: Path, monitor: str) -> list[float]:
    """The monitored metric at each validation that a job has recorded."""
    try:
        return list(column(folder / METRICS, monitor))
    except FileNotFoundError:
        return []


class Rows:
    """The validations of a job that is still writing."""

    def __init__(self, folder: Path, monitor: str) -> None:
        self.folder, self.monitor = folder, monitor
        self._before: list[float] = []

    def settled(self) -> list[float]:
        """The rows on which this look and the one before agree: one that is being written may be read in part."""
        now = validations(self.folder, self.monitor)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(now, self._before, strict=False))
        settled = [value for value, _ in same]
        self._before = now
        return settled


def pruner_of(past: Any, pruner: Any) -> Pruner:
    """Optuna's pruner with the trials of earlier batches.

    Args:
        past: the study in memory.
        pruner: Optuna's, None: none.
    """
    from optuna.trial import TrialState, create_trial

    def prunes(values: dict[int, float]) -> bool:
        if pruner is None:
            return False
        return bool(pruner.prune(past, create_trial(state=TrialState.RUNNING, intermediate_values=values)))

    return prunes
