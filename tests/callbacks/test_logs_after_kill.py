"""What stands beside the checkpoints after a run was killed and continued: every step once, none missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm_lightning import checkpoint as checkpoints
from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.callbacks.run_logs import MetricsFile, TensorBoard, read_metrics
from llm_lightning.callbacks.samples import Samples
from llm_lightning.callbacks.throughput import Throughput

MEASURED = ("train/tokens_per_second", "train/peak_memory_gib")


class KilledError(Exception): ...


class KillAt(L.Callback):
    def __init__(self, step: int, hook: str) -> None:
        self.step = step
        setattr(self, hook, self._kill)

    def _kill(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            raise KilledError


def metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return {name: curve for name, curve in read_metrics(folder / "metrics.csv").items() if name not in MEASURED}


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {tag: curve for tag, curve in curves.items() if tag not in MEASURED} | {
        tag: [(event.step, 0.0) for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }


def test_logs_of_a_killed_run_equal_those_of_an_uninterrupted_one(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any
) -> None:
    def run(folder: Path, *extra: L.Callback) -> None:
        L.seed_everything(7, verbose=False)
        path = checkpoints.newest_valid(folder / "checkpoints")
        resumed_step = checkpoints.read_header(path)["step"] if path else 0
        loggers = [kind(folder, resumed_step=resumed_step) for kind in (MetricsFile, TensorBoard)]
        callbacks = [Checkpoints(every_n_steps=2), Samples(["ab"], max_new_tokens=4), Throughput(), *extra]
        trainer = make_trainer(folder, callbacks, logger=loggers, accumulate_grad_batches=2, log_every_n_steps=1)
        data = make_data(batch_size=2, seed=5)
        trainer.fit(make_module(dropout=0.3), datamodule=data, ckpt_path=path, weights_only=True)

    whole_run = tmp_path / "whole"
    run(whole_run)
    whole = metrics(whole_run)
    assert [step for step, _ in whole["train/loss"]] == list(range(12))
    assert [step for step, _ in whole["train/loss_epoch"]] == [5, 11]
    assert (whole_run / "samples.md").read_text().count("## step ") == 2
    # In the first steps, after a checkpoint, in validation, between two epochs; twice in the same run.
    for hook, *steps in [
        ("on_train_batch_end", 1, 5),
        ("on_validation_end", 6),
        ("on_train_epoch_end", 6, 12),
    ]:
        killed_run = tmp_path / f"{hook}_{steps}"
        for step in steps:
            with pytest.raises(KilledError):
                run(killed_run, KillAt(step, hook))
        run(killed_run)
        assert metrics(killed_run) == whole
        assert tensorboard(killed_run) == tensorboard(whole_run)
        assert (killed_run / "samples.md").read_text() == (whole_run / "samples.md").read_text()
