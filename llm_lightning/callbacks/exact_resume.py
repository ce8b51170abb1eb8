"""Exact resume: a run that was killed ends with the same bits as one that was not.

Lightning's checkpoint holds weights, optimizer and schedule. This callback adds the random number generators of every
process, and a loop state that means "k batches of epoch e are done, nothing else has begun". On resume it makes the
data module continue behind batch k, and checks that the first batch is the right one. Where a run continues on another
number of processes, or with other micro-batches, k becomes the number of those that the same samples fill.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.connectors import checkpoint_connector

from llm_lightning.callbacks.endings import forget_limits, start_again, stays_stopped, stopped_by
from llm_lightning.tasks.base import batches_per_epoch
from llm_lightning.tasks.layout import layout_before, layout_of, refuse_other_step
from llm_lightning.weights.checkpoint import HEADER, CheckpointError

log = logging.getLogger(__name__)


class ExactResume(L.Callback):
    """Save and restore the position in the data and the random number generators."""

    def __init__(self) -> None:
        self._position: tuple[int, int] | None = None
        self._set_generators: Callable[[], None] | None = None
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
        self._position = move_position(trainer, checkpoint)
        trainer.datamodule.resume(*self._position)  # type: ignore[attr-defined]
        self._set_generators = _generators(trainer, checkpoint)
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
        if trainer.global_rank and self._set_generators is None:  # or each process would draw the same dropout masks
            self._set_generators = partial(seed_generators, pl_module.datamodule.seed, trainer.global_rank, made)
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
        if self._set_generators is not None:
            self._set_generators()
            self._set_generators = None


@contextmanager
def refusing_damage(checkpoint: Path | None) -> Iterator[None]:
    """Turn an exception of Lightning about the content of a checkpoint into one clear error.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        yield
    except Exception as error:
        damage = damage_of(error, checkpoint)
        if damage is None:
            raise
        raise damage from error


def damage_of(error: Exception, checkpoint: Any) -> CheckpointError | None:
    """The clear error that an exception of Lightning about the content of a checkpoint is; None if it is another."""
    names = {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}
    if checkpoint is None or checkpoint_connector.__name__ not in names or isinstance(error, (ValueError, OSError)):
        return None
    return CheckpointError(
        f"{checkpoint} lacks what this run needs to continue ({type(error).__name__}: "
        f"{' '.join(str(error).split())}); use another checkpoint of the run, or train again"
    )


def position(trainer: L.Trainer) -> tuple[int, int]:
    """(epoch, finished micro-batches in it), with (e + 1, 0) for the end of epoch e."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    done, epoch = progress.completed, trainer.fit_loop.epoch_progress.current
    if done >= trainer.num_training_batches:
        done = 0
        return (epoch.completed, 0) if epoch.completed == epoch.ready else (epoch.completed + 1, 0)
    # A run stopped inside an epoch (max_steps, early stopping) still counts the epoch as completed.
    return (epoch.completed - 1 if done and epoch.completed == epoch.ready else epoch.completed), done


def move_position(trainer: L.Trainer, checkpoint: dict[str, Any]) -> tuple[int, int]:
    """(epoch, finished micro-batches in it) of a checkpoint; its counters are converted to the layout of this start.

    Raises:
        ValueError: if an update had another number of samples.
        CheckpointError: if the position is not between two updates.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    epoch, done = checkpoint["position"]["epoch"], checkpoint["position"]["batches_done"]
    now, processes = layout_of(trainer, data), len(checkpoint["rng"])
    before = layout_before(checkpoint[HEADER], processes) or now._replace(processes=processes)
    refuse_other_step(before, now)
    if before[:3] == now[:3]:
        return epoch, done
    updates, rest = divmod(done, before.accumulated)
    if rest:
        raise CheckpointError(
            f"{trainer.ckpt_path}: position.batches_done={done} is inside an update of {before.accumulated} batches; "
            "use another checkpoint of the run, or train again"
        )
    done = updates * now.accumulated
    _write_position(checkpoint["loops"]["fit_loop"], epoch, done, total=epoch * batches_per_epoch(trainer, data) + done)
    return epoch, done


def _generators(trainer: L.Trainer, checkpoint: dict[str, Any]) -> Callable[[], None]:
    """What restores the generators of this process, or seeds new ones if other processes wrote the checkpoint."""
    states, rank = checkpoint["rng"], trainer.global_rank
    if len(states) == trainer.world_size:
        return partial(set_rng_state, states[rank])
    if rank == 0:
        log.info(
            "The run goes on with %d processes instead of %d: dropout masks differ between process counts",
            trainer.world_size, len(states),
        )  # fmt: skip
    seed = trainer.datamodule.seed  # type: ignore[attr-defined]
    return partial(seed_generators, seed, rank, checkpoint["global_step"])


def seed_generators(seed: int, rank: int, step: int) -> None:
    """Seed the generators of a process for the updates from `step` on; each process and step gets its own."""
    for_python, for_numpy, for_torch = map(int, np.random.SeedSequence([seed, rank, step]).generate_state(3))
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.manual_seed(for_torch)


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


def _write_position(fit_loop: dict[str, Any], epoch: int, batches_done: int, total: int | None = None) -> None:
    """Rewrite Lightning's counters to "`batches_done` batches of `epoch` are done, nothing else has begun".

    Its own state depends on the hook that saves, and some of those states resume by validating or stepping twice.

    Args:
        total: batches of all epochs until then; None: as counted.
    """
    for counter in fit_loop["epoch_progress"].values():
        begun = epoch + 1 if batches_done else epoch
        counter.update(ready=begun, started=begun, processed=epoch, completed=epoch)
    batches = fit_loop["epoch_loop.batch_progress"]
    done = batches["total"]["completed"] if total is None else total
    batches["total"].update(ready=done, started=done, processed=done, completed=done)
    batches["current"].update(ready=batches_done, started=batches_done, processed=batches_done, completed=batches_done)
    batches["is_last_batch"] = False
