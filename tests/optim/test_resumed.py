"""Runs with every optimizer and schedule that stop and go on: to the last bit what one run gives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ragged import RaggedDataModule, tiny_module, tiny_trainer
from tiny_run import assert_same

from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.base import OptimizerConfig
from llm_lightning.optim.muon import MuonConfig
from llm_lightning.optim.schedules import ConstantConfig, ScheduleConfig, WSDConfig
from llm_lightning.optim.torch_optim import TorchOptimConfig
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.checks.resume import compare_with_run

SGD = TorchOptimConfig(lr=0.1, optimizer=torch.optim.SGD, arguments={"momentum": 0.9, "nesterov": True})


class StopAt(L.Callback):
    """Ask for the end of the run after `step` updates, as a signal does."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.step


def run(
    folder: Path, optimizer: OptimizerConfig, schedule: ScheduleConfig, max_steps: int, stop: int | None = None
) -> dict[str, Any]:
    """Train up to `max_steps`, from the newest checkpoint in `folder` if there is one: the state at the end."""
    L.seed_everything(7, verbose=False)
    module = tiny_module(dropout=0.3)
    module.optimizer_config, module.schedule = optimizer, schedule
    trainer = tiny_trainer(folder, [StopAt(stop), Checkpoints()], max_epochs=-1, max_steps=max_steps)
    path = checkpoints.newest_valid(folder / "checkpoints")
    trainer.fit(module, datamodule=RaggedDataModule(batch_size=2, seed=5), ckpt_path=path, weights_only=True)
    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    return {key: state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step")}


@pytest.mark.parametrize(
    "optimizer",
    [SGD, TorchOptimConfig(lr=1e-2, optimizer=torch.optim.Adafactor, arguments={})],
    ids=["sgd", "adafactor"],
)
def test_a_run_that_goes_on_ends_with_the_bits_of_one_run(tmp_path: Path, optimizer: OptimizerConfig) -> None:
    whole = run(tmp_path / "whole", optimizer, ConstantConfig(), 4)
    run(tmp_path / "parts", optimizer, ConstantConfig(), 2)
    assert_same(whole, run(tmp_path / "parts", optimizer, ConstantConfig(), 4))


@pytest.mark.slow
def test_muon_made_longer_before_the_decay_of_wsd_equals_the_long_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="llm_lightning")
    optimizer, schedule = MuonConfig(lr=1e-2), WSDConfig(warmup=2, decay=0.3)
    whole = run(tmp_path / "whole", optimizer, schedule, 9)
    assert run(tmp_path / "parts", optimizer, schedule, 6, stop=4)["global_step"] == 4  # where its decay begins
    assert_same(whole, run(tmp_path / "parts", optimizer, schedule, 9))
    assert "goes on at learning rate" not in caplog.text


def test_made_longer_from_inside_its_decay_a_run_says_that_the_rate_rises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="llm_lightning")
    schedule = WSDConfig(warmup=2, decay=4)
    run(tmp_path, AdamWConfig(lr=1e-2), schedule, 6)
    run(tmp_path, AdamWConfig(lr=1e-2), schedule, 12)
    assert [message for message in caplog.messages if "learning rate" in message] == [
        "Step 6 goes on at learning rate 0.01 instead of 0: the schedule is now 12 steps long; to end as one long run "
        "would, make a run longer before its decay begins, with scheduler.warmup as a number of steps"
    ]


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (MuonConfig(), "momentum_buffer"),
        (SGD, "momentum_buffer"),
        (TorchOptimConfig(optimizer=torch.optim.NAdam, arguments={}), "mu_product"),
        (TorchOptimConfig(optimizer=torch.optim.Adadelta, arguments={}), "acc_delta"),
    ],
)
def test_a_damaged_state_is_refused_before_it_is_used(optimizer: OptimizerConfig, kind: str) -> None:
    model = tiny_module().model
    built = optimizer.build(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    trained = dict(model.named_parameters())
    whole = {"state_dict": {}, "optimizer_states": [built.state_dict()]}
    compare_with_run(whole, {}, trained)
    of_one = whole["optimizer_states"][0]["state"][0]
    for damaged in ({}, {kind: torch.ones(3)}):
        wrong = {name: value for name, value in of_one.items() if name != kind} | {"other": 1} | damaged
        state = {**built.state_dict(), "state": {**built.state_dict()["state"], 0: wrong}}
        with pytest.raises(ValueError, match=rf"optimizer_states.0.state.0.{kind} must be a tensor of the shape"):
            compare_with_run({**whole, "optimizer_states": [state]}, {}, trained)
