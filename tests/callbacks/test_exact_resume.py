"""A run that stops anywhere and continues ends with the same bits as one that does not."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from ragged import RaggedDataModule, tiny_module, tiny_trainer
from tiny_run import SETTINGS, assert_same, fit_here

from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.callbacks.exact_resume import rng_state, set_rng_state
from llm_lightning.tasks.layout import Layout, share
from llm_lightning.weights import checkpoint as checkpoints

KILLS = [
    (1, "on_train_batch_start"),
    (3, "on_train_batch_end"),
    (4, "on_train_batch_start"),
    (6, "on_train_epoch_end"),
    (6, "on_validation_start"),
    (7, "on_validation_end"),
    (8, "on_before_optimizer_step"),
    (9, "on_train_batch_end"),
    (11, "on_train_batch_start"),
    (12, "on_train_epoch_end"),
]
"""(updates done, hook): a kill the first time that this hook is called after so many updates."""


class CopyAt(L.Callback):
    """Copy the run folder at each of `KILLS`: what a kill at that moment leaves (it saves nothing)."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        for hook in {hook for _, hook in KILLS}:
            setattr(self, hook, partial(self._copy, hook))

    def _copy(self, hook: str, trainer: L.Trainer, *_: Any) -> None:
        for step, at in KILLS:
            copy = self.copies / f"{step}_{hook}"
            if at == hook and trainer.global_step >= step and not copy.exists():
                shutil.copytree(self.folder, copy)


class Seen(L.Callback):
    """Records which samples each update saw."""

    def __init__(self) -> None:
        self.samples: dict[tuple[int, int], tuple[int, ...]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.samples[(trainer.current_epoch, batch_idx)] = batch.sample_ids


class Whole(NamedTuple):
    """A run that is not killed, and what kills would have left of it."""

    folder: Path
    copies: Path
    seen: Seen
    val: dict[str, Any]


def final_state(folder: Path) -> dict[str, Any]:
    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    return {key: state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "task_module")}


def run(folder: Path, val: dict[str, Any], *extra: L.Callback) -> Seen:
    """22 samples, batch 2, accumulation 2: 11 micro-batches and 6 updates an epoch, the last window is partial."""
    seen = Seen()
    L.seed_everything(7, verbose=False)
    callbacks = [Checkpoints(every_n_steps=2), seen, *extra]
    trainer = tiny_trainer(folder, callbacks, accumulate_grad_batches=2, **val)
    path = checkpoints.newest_valid(folder / "checkpoints")
    data = RaggedDataModule(batch_size=2, seed=5)
    trainer.fit(tiny_module(dropout=0.3), datamodule=data, ckpt_path=path, weights_only=True)
    return seen


@pytest.fixture(scope="module", params=[{}, {"val_check_interval": 4}], ids=["val0", "val1"])
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Whole:
    folder, copies = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("copies")
    return Whole(folder, copies, run(folder, request.param, CopyAt(folder, copies)), request.param)


@pytest.mark.parametrize(("step", "hook"), KILLS)
def test_killed_run_equals_uninterrupted_one(whole: Whole, step: int, hook: str) -> None:
    killed = whole.copies / f"{step}_{hook}"
    assert (killed / "checkpoints" / "last.ckpt").is_file() == (step > 1)
    rest = run(killed, whole.val)
    assert_same(final_state(whole.folder), final_state(killed))
    assert rest.samples.items() <= whole.seen.samples.items()
    assert (len(rest.samples) == len(whole.seen.samples)) == (step == 1), "it goes on behind the newest checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_run_goes_on_behind_records_that_were_dropped(tmp_path: Path, task: str) -> None:
    """Every third record is too long: the ids of samples, which are those of records, are not their indices."""
    rows = [
        {
            "instruction": f"Say {i}",
            "output": "yes",
            "chosen": "yes",
            "rejected": "no",
            "input": "x" * 99 * (i % 3 == 0),
        }
        for i in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [*(word for word in SETTINGS if "samples." not in word), f"task={task}", f"data.path={tmp_path}/rows.json"]
    words += ["data.template='{instruction} {input}: {response}'", "data.too_long=drop", "data.max_dropped=0.5"]
    words += ["callbacks.samples=null", "model.context_length=48", f"hydra.run.dir={tmp_path / 'run'}"]
    if task == "sft":
        words.append("callbacks.responses=null")
    for steps in (2, 5):
        outcome = fit_here([*words, f"trainer.max_steps={steps}"])
        assert outcome.code == 0, outcome.err
    assert "dropped" in outcome.out
    assert "Resuming from" in outcome.out


@pytest.mark.slow
def test_stopped_by_max_steps_inside_an_epoch_and_extended(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any
) -> None:
    def run(folder: Path, max_steps: int) -> None:
        L.seed_everything(7, verbose=False)
        module = make_module(dropout=0.3)
        module.schedule = type(module.schedule)(warmup=0, min_lr=1e-2)  # a schedule that the horizon does not change
        trainer = make_trainer(folder, max_epochs=-1, max_steps=max_steps)
        path = checkpoints.newest_valid(folder / "checkpoints")
        trainer.fit(module, datamodule=make_data(batch_size=2), ckpt_path=path, weights_only=True)

    run(tmp_path / "whole", 17)
    run(tmp_path / "extended", 7)
    run(tmp_path / "extended", 17)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "extended"))


def test_rng_state_round_trip() -> None:
    state = rng_state()
    first = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    set_rng_state(state)
    assert first == (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())


def test_an_extended_run_follows_the_schedule_of_its_new_length(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any
) -> None:
    for max_steps in (5, 9):
        module = make_module()
        path = checkpoints.newest_valid(tmp_path / "checkpoints")
        rates: dict[int, float] = {}
        trainer = make_trainer(tmp_path, [Checkpoints(), Rates(rates)], max_epochs=-1, max_steps=max_steps)
        trainer.fit(module, datamodule=make_data(batch_size=2), ckpt_path=path, weights_only=True)
    expected = [module.schedule.lr_at(step, 1e-2, 9) for step in range(5, 9)]
    assert [rates[step] for step in range(5, 9)] == pytest.approx(expected)


class Rates(L.Callback):
    def __init__(self, rates: dict[int, float]) -> None:
        self.rates = rates

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.rates[trainer.global_step - 1] = pl_module.last_lr


class Updates(L.Callback):
    """Records the samples of each update, and after how many updates validation ran."""

    def __init__(self) -> None:
        self.samples: dict[int, tuple[int, ...]] = {}
        self.validations: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.samples[trainer.global_step] = self.samples.get(trainer.global_step, ()) + batch.sample_ids

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.validations.append((trainer.current_epoch, trainer.global_step))


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True])
def test_other_micro_batches_continue_behind_the_same_samples(tmp_path: Path, is_old: bool) -> None:
    """22 samples, 4 an update: (4 x 1 accumulated) stops after 4 of 6 updates, and goes on as (2 x 2 accumulated).

    Validation is counted across epochs, which then have 12 batches, one of them without samples. Checkpoints of earlier
    versions do not name their layout.
    """

    def run(folder: Path, max_steps: int, batch_size: int) -> Updates:
        updates, path = Updates(), checkpoints.newest_valid(folder / "checkpoints")
        module, data = tiny_module(dtype=torch.float64), RaggedDataModule(batch_size=batch_size, seed=5)
        module.schedule = type(module.schedule)(warmup=0, min_lr=1e-2)  # a schedule that the horizon does not change
        often = {"val_check_interval": 3, "check_val_every_n_epoch": None, "accumulate_grad_batches": 4 // batch_size}
        trainer = tiny_trainer(folder, [Checkpoints(), updates], max_epochs=-1, max_steps=max_steps, **often)
        share(trainer, data, Layout(4, 1, 1, 4))
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        return updates

    whole, first = run(tmp_path / "whole", 15, 4), run(tmp_path / "moved", 4, 4)
    if is_old:
        path = checkpoints.newest_valid(tmp_path / "moved" / "checkpoints")
        assert path is not None
        state = checkpoints.load(path)
        del state[checkpoints.HEADER]["layout"]
        state[checkpoints.HEADER]["config"] = {"data": {"batch_size": 4}, "trainer": {"accumulate_grad_batches": 1}}
        checkpoints.save(path, state)
    rest = run(tmp_path / "moved", 15, 2)
    assert {step: ids for step, ids in rest.samples.items() if ids} == {s: whole.samples[s] for s in range(4, 15)}
    assert first.samples == {step: whole.samples[step] for step in range(4)}
    # A run that ends validates once more.
    assert [one for one in first.validations if one[1] % 3 == 0] + rest.validations == whole.validations
    one, other = final_state(tmp_path / "whole"), final_state(tmp_path / "moved")
    assert one["task_module"]["items_seen"] == other["task_module"]["items_seen"]
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=0, atol=1e-12)  # float64, 15 updates
