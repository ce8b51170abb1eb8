"""Callbacks that act while a file exists: the weights are spoilt until somebody mends them, or a step takes long."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L


class Faulty(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.path.exists():
            next(pl_module.parameters()).data.fill_(float("nan"))


class Slow(L.Callback):
    """Take a while for each step as long as a file exists."""

    def __init__(self, path: str, seconds: float = 0.3) -> None:
        self.path, self.seconds = Path(path), seconds

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.path.exists():
            time.sleep(self.seconds)


class Waits(L.Callback):
    """Make no step as long as a file exists."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_fit_start(self, *_: Any) -> None:
        while self.path.exists():
            time.sleep(0.3)


class Killed(L.Callback):
    """Let one rank be killed after a step, if a file exists, which goes with it."""

    def __init__(self, path: str, step: int = 3, rank: int = 1) -> None:
        self.path, self.step, self.rank = Path(path), step, rank

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step) and self.path.exists():
            self.path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
