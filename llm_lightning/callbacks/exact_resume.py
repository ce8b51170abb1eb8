"""Exact resume: a run that was killed ends with the same bits as one that was not.

Lightning's checkpoint holds weights, optimizer and schedule. This callback adds the random number generators of every
process, and a loop state that means "k batches of epoch e are done, nothing else has begun". On resume it makes the
data module continue behind batch k, and checks that the first batch is the right one.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.connectors import checkpoint_connector

from llm_lightning.callbacks.endings import forget_limits, start_again, stays_stopped, stopped_by
from llm_lightning.weights.checkpoint import HEADER, CheckpointError


class ExactResume(L.Callback):
    """Save and restore the position in the data and the random number generators."""

    def __init__(self) -> None:
        self._position: tuple[int, int] | None = None
        self._rng: dict[str, Any] | None = None
        self._stopped_of: int | None = None
        self._stays_stopped = True
        self._step: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Our data module continues at the right batch without the loader's help.
        warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        epoch, batches_done = position(trainer)
        checkpoint["position"] = {"epoch": epoch, "batches_done": batches_done}
        checkpoint["stopped_of"] = pl_module.total_steps if trainer.should_stop else None
        checkpoint["stopped_by"] = stopped_by(trainer, pl_module.total_steps)
        checkpoint["rng"] = _gather(trainer, rng_state())
        _write_position(checkpoint["loops"]["fit_loop"], epoch, batches_done)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._position = (checkpoint["position"]["epoch"], checkpoint["position"]["batches_done"])
        trainer.datamodule.resume(*self._position)  # type: ignore[attr-defined]
        states = checkpoint["rng"]
        if len(states) != trainer.world_size:
            raise ValueError(
                f"cannot resume: the run has {len(states)} processes, this start has {trainer.world_size}, and its "
                "batches would differ; start as many (trainer.devices), or a new run under another run_name"
            )
        self._rng = states[trainer.global_rank]
        self._stopped_of = checkpoint["stopped_of"]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._stays_stopped = self._stopped_of is not None and stays_stopped(checkpoint, callbacks)
        forget_limits(checkpoint, callbacks)
        self._step = checkpoint["global_step"]
        for logger in trainer.loggers:
            if trainer.state.fn == "fit" and hasattr(logger, "expect"):
                logger.expect(checkpoint[HEADER].get("rows"))

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        made = trainer.global_step
        if self._step not in (None, made):
            raise CheckpointError(
                f"{trainer.ckpt_path}: global_step={self._step}, but its loops have made {made} updates; use another "
                "checkpoint of the run, or train again"
            )
        if self._stopped_of == pl_module.total_steps and self._stays_stopped:
            trainer.should_stop = True  # it stopped early; a run with more steps than before continues
        elif self._stopped_of is not None:
            start_again(trainer.callbacks)  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Here, not earlier: set-up may draw from the generators before.
        if self._position is not None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            samples = [data.train_samples[index] for index in data.expected_samples(*self._position)]
            expected = data.collate(samples).sample_ids
            assert batch.sample_ids == expected, f"resumed at samples {batch.sample_ids}, expected {expected}"
            self._position = None
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None


@contextmanager
def refusing_damage(checkpoint: Path | None) -> Iterator[None]:
    """Turn an exception of Lightning about the content of a checkpoint into one clear error.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        names = {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}
        if checkpoint is None or checkpoint_connector.__name__ not in names:
            raise
        raise CheckpointError(
            f"{checkpoint} lacks what this run needs to continue ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); use another checkpoint of the run, or train again"
        ) from error


def position(trainer: L.Trainer) -> tuple[int, int]:
    """(epoch, finished micro-batches in it), with (e + 1, 0) for the end of epoch e."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    done, epoch = progress.completed, trainer.fit_loop.epoch_progress.current
    if done >= trainer.num_training_batches:
        done = 0
        return (epoch.completed, 0) if epoch.completed == epoch.ready else (epoch.completed + 1, 0)
    # A run stopped inside an epoch (max_steps, early stopping) still counts the epoch as completed.
    return (epoch.completed - 1 if done and epoch.completed == epoch.ready else epoch.completed), done


def rng_state() -> dict[str, Any]:
    """The generators of this process as tensors and plain values, which `weights_only=True` loads."""
    version, words, gauss = random.getstate()
    kind, keys, index, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "index": int(index),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        # A run on the CPU leaves a GPU of the machine alone: reading its generators would allocate memory on it.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore `rng_state()`."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["index"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def _gather(trainer: L.Trainer, state: dict[str, Any]) -> list[dict[str, Any]]:
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, state)
    return states


def _write_position(fit_loop: dict[str, Any], epoch: int, batches_done: int) -> None:
    """Rewrite Lightning's counters to "`batches_done` batches of `epoch` are done, nothing else has begun".

    Its own state depends on the hook that saves, and some of those states resume by validating or stepping twice.
    """
    for counter in fit_loop["epoch_progress"].values():
        begun = epoch + 1 if batches_done else epoch
        counter.update(ready=begun, started=begun, processed=epoch, completed=epoch)
    batches = fit_loop["epoch_loop.batch_progress"]
    done = batches["total"]["completed"]
    batches["total"].update(ready=done, started=done, processed=done)
    batches["current"].update(ready=batches_done, started=batches_done, processed=batches_done, completed=batches_done)
    batches["is_last_batch"] = False
