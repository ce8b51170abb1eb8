"""A signal makes a run save its current step and end with 128 + the signal's number."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment

from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.signals import STOPPING

log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818
    """The run stopped because of a signal, after saving if it has checkpoints. Not an error."""

    def __init__(self, signum: int, path: Path | None) -> None:
        saved = "nothing was saved" if path is None else f"saved {path}; continue with resume={path.parents[1]}"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {saved}")
        self.exit_code = 128 + signum


class Signals(L.Callback):
    """Let SIGTERM, SIGINT, SIGHUP and SIGUSR1 end a run between two updates, after the last one's validation.

    During the test everything is saved already, so the run ends at once. A signal that was ignored when the run
    started (`nohup`) stays ignored; the signal that announces the end of a requeued SLURM job stays Lightning's.
    Repeated signals change nothing, but a second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._interrupts = 0
        self._at_once: Callable[[int], Interrupted] | None = None

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_signalled(trainer, save=True)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size == 1:  # several processes must agree, or some wait for ever
            self._at_once = partial(Interrupted, path=_last(trainer))
        self._take(trainer)

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._stop_if_signalled(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop_if_signalled(trainer)  # a signal during the last update, which is saved by now
        self._at_once = None

    def _take(self, trainer: L.Trainer) -> None:
        """Handle the signals until fit or test ends, when Lightning restores the earlier handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        connector = trainer._signal_connector
        environment = trainer._accelerator_connector.cluster_environment
        requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        for signum in STOPPING:
            if connector._original_handlers.get(signum) is signal.SIG_IGN:
                signal.signal(signum, signal.SIG_IGN)
            elif not (requeues and signum == environment.requeue_signal):  # type: ignore[attr-defined]
                signal.signal(signum, self._on_signal)
        if connector.received_sigterm:  # by Lightning's own handler, active until now
            connector.received_sigterm = False  # or Lightning exits with 0 and without a checkpoint
            signal.raise_signal(signal.SIGTERM)

    def _on_signal(self, signum: int, _: Any) -> None:
        self._interrupts += signum == signal.SIGINT
        if self._interrupts == 2:  # the user insists
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if self._signal is not None:  # SLURM repeats its signal, and a parent forwards what the whole group got
            return
        self._signal = signum
        if self._at_once is not None:
            raise self._at_once(signum)
        log.warning("%s received: saving at the next step", signal.Signals(signum).name)

    def _stop_if_signalled(self, trainer: L.Trainer, *, save: bool = False) -> None:
        signum = self._agreed(trainer)
        if signum is None:
            return
        saved = _last(trainer, save=save)
        # Lightning kills the first process at the sight of another that has ended with a code of its own.
        getattr(trainer.strategy.launcher, "procs", []).clear()
        raise Interrupted(signum, saved)

    def _agreed(self, trainer: L.Trainer) -> int | None:
        if trainer.world_size == 1:
            return self._signal
        if not trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            return None
        return self._signal or signal.SIGTERM


def _last(trainer: L.Trainer, *, save: bool = False) -> Path | None:
    """The newest checkpoint of the run, made now with `save`; None if the run keeps none."""
    kept: Any = next((one for one in trainer.callbacks if isinstance(one, Checkpoints)), None)  # type: ignore[attr-defined]
    if kept is None:
        return None
    return kept.save(trainer) if save else Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
