"""Token-exact gradients: (batch 8) = (batch 2, accumulate 4) = (2 processes, batch 2, accumulate 2)."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from record_gradients import train

from llm_lightning.tasks.base import NonFiniteError


def record(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """Gradients of every update of one epoch over 22 ragged samples: the last window is partial."""
    (folder / name).mkdir()
    out = folder / name / "gradients.pt"
    options["out"] = str(out)
    if options.get("devices", 1) == 1:
        train(options)
    else:  # forks start in no time; each is told its rank, as by a launcher
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=be_rank, args=(rank, port, options)) for rank in range(options["devices"])]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
        assert [process.exitcode for process in ranks] == [0] * len(ranks)
    return torch.load(out, weights_only=True)


def be_rank(rank: int, port: int, options: dict[str, Any]) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "NODE_RANK": "0"}
    train(options)


def assert_close(one: dict[str, Any], other: dict[str, Any], tolerance: float, updates: int = 3) -> None:
    """Largest difference of any gradient, as a share of the update's largest gradient."""
    assert len(one["updates"]) == len(other["updates"]) == 3  # 22 samples, 8 an update
    for a, b in list(zip(one["updates"], other["updates"], strict=True))[:updates]:
        largest = max(gradient.abs().max() for gradient in a.values())
        for name in a:
            assert (a[name] - b[name]).abs().max() <= tolerance * largest, name
    assert one["val/loss"] == pytest.approx(other["val/loss"], rel=tolerance * 10)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_same_gradients_however_the_batch_is_cut(tmp_path: Path, dtype: str, tolerance: float) -> None:
    precision = {"float64": "64-true", "float32": "32-true"}[dtype]
    common = {"dtype": dtype, "precision": precision}
    # In fp32, two runs drift apart from the second update on (Adam divides by tiny numbers): compare the first.
    updates = 3 if dtype == "float64" else 1
    whole = record(tmp_path, "whole", batch_size=8, **common)
    accumulated = record(tmp_path, "accumulated", batch_size=2, accumulate_grad_batches=4, **common)
    assert_close(whole, accumulated, tolerance, updates)
    two = {"batch_size": 2, "accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp"}
    assert_close(whole, record(tmp_path, "ddp", **two, **common), tolerance, updates)


def test_gradients_are_the_mean_over_targets(tmp_path: Path, make_data: Any, make_module: Any) -> None:
    """Against autograd of the plain mean cross-entropy over the same 8 samples."""
    recorded = record(tmp_path, "whole", batch_size=8, dtype="float64", precision="64-true")["updates"][0]
    module, data = make_module(dtype=torch.float64), make_data(batch_size=8, seed=3)
    batch = data.collate([data.train_samples[i] for i in data.expected_samples(0, 0)])
    logits = module.model(batch.input_ids)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100).backward()
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(recorded[name], parameter.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_fsdp_gives_the_same_gradients(tmp_path: Path) -> None:
    common = {"dtype": "float32", "precision": "32-true"}
    whole = record(tmp_path, "whole", batch_size=8, **common)
    port = {"batch_size": 2, "accumulate_grad_batches": 2, "devices": 2, "strategy": "fsdp2"}
    assert_close(whole, record(tmp_path, "fsdp", **port, **common), 1e-6, updates=1)


def test_lightnings_own_sharding_is_refused(tmp_path: Path, make_module: Any, make_trainer: Any) -> None:
    """Its checkpoints number the optimizer's states in another way than those of every other strategy."""
    trainer = make_trainer(tmp_path, strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="use accelerator=fsdp"):
        make_module().check_plan(trainer, 10)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_before_the_update(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any, where: str
) -> None:
    module = make_module()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    if where == "loss":
        module.model.final_norm.register_forward_hook(lambda *args: args[2] * math.nan)
    else:
        module.model.token_embedding.weight.register_hook(lambda gradient: gradient * math.inf)
    trainer = make_trainer(tmp_path)
    with pytest.raises(NonFiniteError, match=rf"non-finite {where} .* at step 0, epoch 0, batch 0 \(samples \d+, \d+"):
        trainer.fit(module, datamodule=make_data(batch_size=2))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_float16_learns_from_the_first_update_on(
    tmp_path: Path, make_data: Any, make_module: Any, make_trainer: Any
) -> None:
    """The loss is a sum; with the scaler's own scale, which suits a mean, its gradient overflows."""
    module, data, scaler = make_module(), make_data(batch_size=22), torch.amp.GradScaler("cpu")
    norms = Norms()
    trainer = make_trainer(tmp_path, [norms], max_epochs=3)
    trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer.fit(module, datamodule=data)
    assert len(norms.of_updates) == 3
    assert all(map(math.isfinite, norms.of_updates))
    n_targets = sum(row.n_targets for row in map(data.train_samples.__getitem__, range(22)))
    assert 2**15 <= scaler.get_scale() * n_targets <= 2**16


class Norms(L.Callback):
    """The gradient norm of each update."""

    def __init__(self) -> None:
        self.of_updates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.of_updates.append(pl_module.last_gradient_norm)
