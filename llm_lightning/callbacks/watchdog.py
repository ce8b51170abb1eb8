"""End a run that makes no progress: a deadlock, a file system that does not answer."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L

from llm_lightning import progress
from llm_lightning.stacks import stacks
from llm_lightning.terminal import say

LOOK_SECONDS = 5.0
"""Seconds between two looks at the clock; the watching thread is late only if the whole process was stopped."""


class Watchdog(L.Callback):
    """Call `alarm` if nothing was finished for some time: a batch, a validation, a checkpoint, a generated token.

    Args:
        minutes: the time; writing a checkpoint must take less.
    """

    def __init__(self, minutes: float = 30.0) -> None:
        if minutes <= 0:
            raise ValueError(f"callbacks.watchdog.minutes={minutes} must be above 0; callbacks.watchdog=null is off")
        self.minutes = minutes
        self.alarm: Callable[[str], None] = say_stacks
        self._over: threading.Event | None = None

    @property
    def message(self) -> str:
        return f"no progress for {self.minutes:g} minutes (callbacks.watchdog.minutes)"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._mark()
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(self._over,), name="watchdog", daemon=True).start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()  # no teardown follows; the process may live on, as a notebook does

    def _end(self) -> None:
        if self._over is not None:
            self._over.set()

    def _mark(self, *_: Any, **__: Any) -> None:
        progress.mark()

    on_train_start = on_train_batch_start = on_train_batch_end = on_train_end = _mark
    on_validation_start = on_validation_batch_end = on_validation_end = on_save_checkpoint = _mark
    on_test_start = on_test_batch_end = on_test_end = _mark

    def _watch(self, over: threading.Event) -> None:
        every = min(LOOK_SECONDS, 15 * self.minutes)
        last = time.monotonic()
        while not over.wait(every):
            now = time.monotonic()
            if now - last > 2 * every:  # ^Z, or a computer that slept: the run was stopped as well
                progress.skip(now - last)
            last = now
            if progress.since() > 60 * self.minutes:
                self.alarm(self.message)
                return


def say_stacks(message: str) -> None:
    """Print what every thread of this process is doing."""
    say(f"{message}:\n{stacks()}", file=sys.stderr, flush=True)
