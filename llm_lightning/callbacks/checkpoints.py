"""When checkpoints are written, and which ones are kept.

A checkpoint is written between two updates, after the validation and the log rows of the last one. So a checkpoint
after N updates covers every row of steps 0..N-1, and no row of step N.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO

from llm_lightning.callbacks.monitored import better_when
from llm_lightning.tasks.in_step import all_say, any_says
from llm_lightning.weights import checkpoint as checkpoints


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through `weights/checkpoint.py`: atomic, with a digest, `weights_only=True`.

    Args:
        opened: the checkpoint that the run continues from; it was verified already.
    """

    def __init__(self, opened: checkpoints.Opened | None = None) -> None:
        self.opened = opened

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoints.save(path, checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return checkpoints.load_to_resume(path, map_location=map_location or "cpu", opened=self.opened)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(L.Callback):
    """Write `step_*.ckpt`, with `last.ckpt` and `best.ckpt` as further names of two of them.

    Args:
        every_n_steps: updates between two checkpoints; null for none.
        every_n_minutes: minutes between two checkpoints; null for none.
        keep: number of `step_*.ckpt` to keep, at least 2, so that one damaged file never ends a run.
        monitor: the metric that picks the best; null keeps no best.
        mode: `min` or `max`; null: by the metric's name (`callbacks/monitored.py`).
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = 500,
        every_n_minutes: float | None = 10.0,
        keep: int = 2,
        monitor: str | None = "val/loss",
        mode: str | None = None,
    ) -> None:
        if keep < 2:
            raise ValueError(
                f"callbacks.checkpoints.keep={keep} must be at least 2: one file may be damaged by a crash"
            )
        if mode is None and monitor is not None:
            mode = better_when(monitor)
        if mode not in ("min", "max") and monitor is not None:
            raise ValueError(f"callbacks.checkpoints.mode={mode!r} must be min or max, for monitor={monitor}")
        self.every_n_steps, self.every_n_minutes, self.keep = every_n_steps, every_n_minutes, keep
        self.monitor, self.mode = monitor, mode
        self.best_value: float | None = None
        self.best_step: int | None = None
        self._best_is_new = False
        self._last_saved_step = 0
        self._last_saved_time = time.monotonic()

    # --- when ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_saved_step, self._last_saved_time = trainer.global_step, time.monotonic()
        path = self._path(trainer)
        if trainer.is_global_zero:
            for damaged in path.parent.glob("step_*.ckpt"):
                if damaged.name > path.name:  # the run fell back to `path`
                    damaged.unlink()
        self._repair_names(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if trainer.global_step > self._last_saved_step and (self._best_is_new or self._due(trainer)):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"monitor={self.monitor} is not among the metrics of this run, which are {known}")
        value = trainer.callback_metrics[self.monitor]
        if not math.isfinite(value):
            return
        sign = 1 if self.mode == "min" else -1
        if self.best_value is None or sign * float(value) < sign * self.best_value:
            self.best_value, self.best_step, self._best_is_new = float(value), trainer.global_step, True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._last_saved_step or self._best_is_new:
            self.save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._repair_names(trainer)  # here too: a run killed after its last checkpoint does not train again

    # --- what ------------------------------------------------------------------------------------------------------

    def save(self, trainer: L.Trainer) -> Path:
        """Write the current state, link its names, and remove older checkpoints."""
        for logger in trainer.loggers:
            logger.save()  # the rows that this checkpoint covers
        _refuse_non_finite(trainer)
        path = self._path(trainer)
        self._best_is_new = False
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            self._name(path, is_best=self.best_step == trainer.global_step)
            for old in sorted(path.parent.glob("step_*.ckpt"))[: -self.keep]:
                old.unlink()
        self._last_saved_step, self._last_saved_time = trainer.global_step, time.monotonic()
        return path.with_name("last.ckpt")

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_value, self.best_step = state["best_value"], state["best_step"]

    # --- details ---------------------------------------------------------------------------------------------------

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" / f"step_{trainer.global_step:08d}.ckpt"

    def _repair_names(self, trainer: L.Trainer) -> None:
        path = self._path(trainer)
        if trainer.is_global_zero and path.is_file():
            self._name(path, is_best=self.best_step == trainer.global_step)  # a kill may have prevented it

    def _name(self, path: Path, *, is_best: bool) -> None:
        for name in ["last.ckpt"] + ["best.ckpt"] * is_best:
            checkpoints.link(path, path.with_name(name))

    def _due(self, trainer: L.Trainer) -> bool:
        if (
            self.every_n_steps
            and trainer.global_step // self.every_n_steps > self._last_saved_step // self.every_n_steps
        ):
            return True
        if not self.every_n_minutes:
            return False
        late = time.monotonic() - self._last_saved_time > 60 * self.every_n_minutes
        return any_says(trainer, "looks whether to save", late)  # clocks differ between processes


def _refuse_non_finite(trainer: L.Trainer) -> None:
    """Refuse weights that are not finite, which a finite loss and gradient do not rule out."""
    trained = [parameter for parameter in trainer.lightning_module.parameters() if parameter.requires_grad]
    parts = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in trained]
    # Minimum and maximum: both are nan if any value is, and no tensor as large as the weights is allocated.
    finite = all(bool(torch.stack(part.detach().aminmax()).isfinite().all()) for part in parts if part.numel())
    if not all_say(trainer, "saves", finite):
        raise ValueError(
            f"non-finite weights after {trainer.global_step} updates: not saved, the last checkpoint is finite; "
            "lower optimizer.lr"
        )
