"""Connect the ranks as soon as they have met, so that each says every two seconds that it lives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from llm_lightning.callbacks.exact_resume import damage_of
from llm_lightning.callbacks.watchdog import Watchdog
from llm_lightning.experiments.errors import cause_of
from llm_lightning.experiments.ranks import causes
from llm_lightning.experiments.ranks.watch import Watch

UNWIND_SECONDS = 8.0
"""Seconds that a rank has to end after its own exception; closing what it shares with the others may take for ever."""


class Heartbeat(L.Callback):
    """Connect the ranks as soon as they have met; in one process, only let the watchdog end the run.

    Args:
        run_dir: the run folder.
        own: packages of the user, whose exceptions keep their traceback.
    """

    def __init__(self, run_dir: Path, own: Sequence[str] = ()) -> None:
        self.run_dir, self.own = run_dir, own
        self.watch: Watch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.watch is None:
            rank, size = trainer.global_rank, trainer.world_size
            causes.join(rank, size, self.run_dir)
            self.watch = Watch(rank, size, self.run_dir)
            if size > 1:
                self.watch.connect(trainer.strategy.broadcast)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Watchdog):
                callback.alarm = self.watch.stalled

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tell the cause at once: the others lose this rank while it closes what it had opened."""
        if self.watch is None or self.watch.size == 1 or not isinstance(exception, Exception):
            return
        if hasattr(exception, "exit_code") or causes.is_consequence(exception):  # it was stopped, or another failed
            return
        cause = cause_of(explained(exception, trainer.ckpt_path), self.run_dir, self.own)
        causes.announce(cause, self.run_dir)
        timer = threading.Timer(UNWIND_SECONDS, causes.end_at_once, [cause.exit_code])
        timer.daemon = True
        timer.start()


def explained(error: Exception, checkpoint: Any) -> Exception:
    """An exception of Lightning as the run will show it, which has not caught it yet."""
    if isinstance(error, MisconfigurationException):
        return ValueError(str(error))
    return damage_of(error, checkpoint) or error
