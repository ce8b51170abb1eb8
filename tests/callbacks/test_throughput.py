from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from llm_lightning.callbacks import throughput
from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.callbacks.run_logs import MetricsFile
from llm_lightning.callbacks.throughput import Throughput, known_peak
from llm_lightning.files.metrics_csv import read_metrics


class Clock:
    """A clock that only the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(throughput.time, "monotonic", lambda: self.now)


class Costs(L.Callback):
    """Every micro-batch takes 1 second, its data 0.5, validation 100, a save 1000, the first micro-batch 9 more."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_after_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self.clock.now += 1.0 + 9.0 * (trainer.fit_loop.total_batch_idx == 0)

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.now += 0.5

    def on_validation_start(self, *_: Any) -> None:
        self.clock.now += 100.0

    def on_save_checkpoint(self, *_: Any) -> None:
        self.clock.now += 1000.0


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pauses_are_not_counted(
    tmp_path: Path,
    make_module: Any,
    make_trainer: Any,
    make_data: Any,
    monkeypatch: pytest.MonkeyPatch,
    order: int,
    accumulate: int,
) -> None:
    clock = Clock(monkeypatch)
    speed = Throughput()
    callbacks = [Checkpoints(every_n_steps=3), Costs(clock)]
    callbacks.insert(order, speed)  # wherever it stands among the others
    trainer = make_trainer(
        tmp_path, callbacks, accumulate_grad_batches=accumulate, val_check_interval=3, check_val_every_n_epoch=None
    )
    module, data = make_module(), make_data(batch_size=2, seed=5)
    data.train_samples.rows = [row[:1].repeat(11) for row in data.train_samples.rows]  # 20 targets a micro-batch
    trainer.fit(module, datamodule=data)
    # 1.5 seconds a micro-batch; 1 where the wait for data coincides with a pause.
    assert 20 / 1.5 <= speed.items_per_second < 20 / 1.2
    assert 0.2 < speed.total_items / module.items_seen < 1
    assert speed.wall_seconds == clock.now > 1000


def test_logs_speed_memory_and_mfu(tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any) -> None:
    logger, speed = MetricsFile(tmp_path), Throughput(peak_tflops=1e-3)
    trainer = make_trainer(tmp_path, [speed], logger=[logger], log_every_n_steps=5, max_epochs=1)
    module = make_module()
    trainer.fit(module, datamodule=make_data(batch_size=2, seed=5))
    curves = read_metrics(logger.path)
    assert [step for step, _ in curves["train/tokens_per_second"]] == [5, 10]  # the first update is not timed
    rates, shares = (dict(curves[f"train/{name}"]) for name in ("tokens_per_second", "mfu"))
    ratio = shares[10] / rates[10] * 1e9
    assert ratio in [pytest.approx(module.model.flops_per_token(length)) for length in range(1, 17)]
    assert all(0.05 < gib < 64 for _, gib in curves["train/peak_memory_gib"])


def test_mfu_is_left_out_where_the_peak_is_unknown(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any
) -> None:
    logger = MetricsFile(tmp_path)
    trainer = make_trainer(tmp_path, [Throughput()], logger=[logger], log_every_n_steps=2, max_epochs=1)
    trainer.fit(make_module(), datamodule=make_data(batch_size=2, seed=5))
    assert "train/mfu" not in read_metrics(logger.path)


def test_wall_seconds_add_up_over_sessions() -> None:
    first = Throughput()
    time.sleep(0.02)
    second = Throughput()
    second.load_state_dict(first.state_dict())
    assert 0.02 <= second.wall_seconds < 5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("Tesla T4", 65.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA T400 4GB", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peaks_by_device_name(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_a_peak_that_is_no_peak_is_refused() -> None:
    with pytest.raises(ValueError, match="peak_tflops=0"):
        Throughput(peak_tflops=0)


@pytest.mark.gpu
def test_peak_of_this_gpu() -> None:
    assert throughput.peak_memory(torch.device("cuda")) >= 0
    assert known_peak(torch.cuda.get_device_name()) is not None
