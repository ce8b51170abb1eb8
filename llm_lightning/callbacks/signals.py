"""A signal makes a run save its current step and end with 128 + the signal's number."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from llm_lightning import signals, slurm
from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.tasks.in_step import any_says
from llm_lightning.terminal import say

BEGIN_SECONDS = 15.0
"""Seconds from a signal to one of several processes until its first batch. SLURM kills after 30 (`KillWait`)."""

log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818
    """The run stopped because of a signal, after saving if it has checkpoints. Not an error.

    Args:
        signum: the signal.
        path: what is saved.
        more: what else happened because of it.
    """

    def __init__(self, signum: int, path: Path | None, more: str = "") -> None:
        saved = "nothing was saved" if path is None else f"saved {path}; continue with resume={path.parents[1]}"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {saved}" + (f"; {more}" if more else ""))
        self.exit_code = 128 + signum


class Signals(L.Callback):
    """Let SIGTERM, SIGINT, SIGHUP and SIGUSR1 end a run between two updates, after the last one's validation.

    Before the first update and during the test everything is saved already, so the run ends at once. A signal that was
    ignored when the run started (`nohup`) stays ignored. Repeated signals change nothing, but a second Ctrl-C ends the
    process at once. A job of SLURM that has saved is requeued where `slurm.requeue` says so.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._interrupts = 0
        self._first_step: int | None = None
        """The step at which this process began to train."""
        self._at_once: Callable[[int], Interrupted] | None = None
        self._speaks = True
        """In the first process only: ^C comes to all."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.world_size == 1:  # several processes must agree, or some wait for ever
            self._at_once = partial(self._interrupted, trainer)
        self._speaks = trainer.is_global_zero
        self._take(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step, self._at_once = trainer.global_step, None
        signals.trained()  # what is received once this class handles nothing any more

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_signalled(trainer, "begins a step", save=True)

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._stop_if_signalled(trainer, "begins a test batch")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop_if_signalled(trainer, "ends")  # a signal during the last update, which is saved by now
        self._at_once = None

    # --- receiving -------------------------------------------------------------------------------------------------

    def _take(self, trainer: L.Trainer) -> None:
        """Handle the signals until fit or test ends, when Lightning restores the earlier handlers.

        In place of Lightning's own handlers: that of SIGTERM talks to the other processes in the middle of whatever
        they do together, and kills the later ones; that of SLURM's signal saves and requeues in its own way.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        connector = trainer._signal_connector
        connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        # It asks all processes before each micro-batch, and waits for the answer, whether Lightning's handler ran.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        connector._original_handlers = connector._get_current_signal_handlers()
        for signum in signals.STOPPING:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._on_signal)
        if (before := signals.asked_to_end()) is not None:  # and something kept that from ending the process
            self._on_signal(before, None)

    def _on_signal(self, signum: int, _: Any) -> None:
        self._interrupts += signum == signal.SIGINT
        if self._interrupts == 2:  # the user insists
            signals.end_at_once(signum)
        signals.asked_to_end(signum)
        if self._signal is not None:  # SLURM repeats its signal, and a parent forwards what the whole group got
            return
        self._signal = signum
        if self._at_once is not None:
            raise self._at_once(signum)
        if self._first_step is None:
            self._end_unless_training_begins(signum)
        if self._speaks:
            log.warning("%s received: saving at the next step", signal.Signals(signum).name)

    def _end_unless_training_begins(self, signum: int) -> None:
        """Several processes agree at the first batch; one that does not get there in time has nothing to save."""

        def end() -> None:
            if self._first_step is None:
                say(signals.Stopped(signum).message, file=sys.stderr, flush=True)
                os._exit(128 + signum)

        timer = threading.Timer(BEGIN_SECONDS, end)
        timer.daemon = True
        timer.start()

    # --- ending ----------------------------------------------------------------------------------------------------

    def _stop_if_signalled(self, trainer: L.Trainer, point: str, *, save: bool = False) -> None:
        signum = self._agreed(trainer, point)
        if signum is None:
            return
        stop = self._interrupted(trainer, signum, save=save)
        # Lightning kills the first process at the sight of another that has ended with a code of its own.
        getattr(trainer.strategy.launcher, "procs", []).clear()
        raise stop

    def _agreed(self, trainer: L.Trainer, point: str) -> int | None:
        if trainer.world_size == 1:
            return self._signal
        if not any_says(trainer, point, self._signal is not None):
            return None
        mine = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(mine, reduce_op="max"))

    def _interrupted(self, trainer: L.Trainer, signum: int, *, save: bool = False) -> Interrupted:
        saved = _last(trainer, save=save)
        more = self._requeued(trainer, signum, is_saved=saved is not None)
        if trainer.world_size > 1:
            trainer.strategy.barrier()  # whoever started the processes may end the others when the first has ended
        return Interrupted(signum, saved, more)

    def _requeued(self, trainer: L.Trainer, signum: int, *, is_saved: bool) -> str:
        """What the first process says of its job of SLURM, which it has requeued if it may; empty without a job."""
        if not trainer.is_global_zero or not slurm.is_job():
            return ""
        if self._first_step is None or trainer.global_step == self._first_step:
            return slurm.not_requeued()
        return slurm.requeue(signum) if is_saved else slurm.not_requeued("nothing is saved")


def _last(trainer: L.Trainer, *, save: bool = False) -> Path | None:
    """The newest checkpoint of the run, made now with `save`; None if the run keeps none."""
    kept: Any = next((one for one in trainer.callbacks if isinstance(one, Checkpoints)), None)  # type: ignore[attr-defined]
    if kept is None:
        return None
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    return kept.save(trainer) if save else last if last.is_file() else None
