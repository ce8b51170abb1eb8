"""A callback that lets one rank fail at a chosen moment, once: while a file exists, which it removes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L


class Failing(L.Callback):
    """Let a rank fail.

    Args:
        path: the file; `start` it with anything in it.
        how: `raise`, the name of a signal, or `uneven`: the rank stops training, and the others do not.
        when: `start`, `training`, `validation` or `saving`.
        rank: which one.
        step: the earliest step, for a moment in training.
    """

    def __init__(self, path: str, how: str, when: str, rank: int = 1, step: int = 3) -> None:
        self.path, self.how, self.when, self.rank, self.step = Path(path), how, when, rank, step

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._fail(trainer, "start")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= self.step:
            self._fail(trainer, "training")

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._fail(trainer, "validation")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Any) -> None:
        if trainer.global_step >= self.step:
            self._fail(trainer, "saving")

    def _fail(self, trainer: L.Trainer, when: str) -> None:
        if when != self.when or trainer.global_rank != self.rank or not self.path.exists():
            return
        self.path.unlink()
        if self.how == "raise":
            raise ValueError("the disk is made of cheese")
        if self.how == "uneven":
            trainer.should_stop = True
        else:
            os.kill(os.getpid(), getattr(signal, self.how))
