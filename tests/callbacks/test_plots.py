from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.callbacks import plots
from llm_lightning.callbacks.plots import Plots, loss_figure, lr_figure
from llm_lightning.callbacks.run_logs import MetricsFile
from llm_lightning.files.metrics_csv import read_metrics


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:])  # type: ignore[return-value]


def test_plots_are_drawn_from_the_metrics(tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any) -> None:
    trainer = make_trainer(tmp_path, [Plots()], logger=[MetricsFile(tmp_path)], log_every_n_steps=2)
    trainer.fit(make_module(), datamodule=make_data(batch_size=2))
    for name in ("loss.png", "lr.png"):
        assert png_size(tmp_path / "plots" / name)[0] > 500
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["loss.png", "lr.png"]


def test_loss_figure_has_epochs_below_and_tokens_above(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in range(20):
        metrics.log_metrics({"train/loss": 5.0 - step / 10, "tokens_seen": 100 * (step + 1), "lr": 0.1}, step)
    metrics.log_metrics({"val/loss": 4.0, "train/eval_loss": 3.9}, 9)
    metrics.log_metrics({"val/loss": 3.5, "train/eval_loss": 3.2}, 19)
    metrics.save()
    figure = loss_figure(read_metrics(metrics.path), steps_per_epoch=10)
    axes = figure.axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines["validation"] == ([1.0, 2.0], [4.0, 3.5])
    assert lines["training, dropout off"] == ([1.0, 2.0], [3.9, 3.2])
    assert len(lines["training, each logged step"][0]) == 20
    (above,) = axes.child_axes
    assert (axes.get_xlabel(), above.get_xlabel()) == ("epochs", "tokens seen")
    figure.savefig(io.BytesIO())
    assert above.get_xlim() == pytest.approx([1000 * limit for limit in axes.get_xlim()])  # 1,000 tokens an epoch
    assert list(lr_figure(read_metrics(metrics.path)).axes[0].get_lines()[0].get_ydata()) == [0.1] * 20


def test_plots_are_drawn_at_most_so_often(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(plots, "draw_plots", lambda folder, steps: drawn.append(folder))
    trainer = make_trainer(tmp_path, [Plots(every_n_seconds=1000)], max_epochs=5)
    trainer.fit(make_module(), datamodule=make_data(batch_size=2))
    assert len(drawn) == 2  # after the first validation and at the end


def test_a_broken_plot_costs_one_warning(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(plots, "draw_plots", broken)
    trainer = make_trainer(tmp_path, [Plots(every_n_seconds=0)], max_epochs=3)
    with pytest.warns(UserWarning, match="no plots: RuntimeError: no font") as warnings:
        trainer.fit(make_module(), datamodule=make_data(batch_size=2))
    assert trainer.current_epoch == 3
    assert sum("no plots" in str(warning.message) for warning in warnings) == 1


def test_a_run_without_metrics_has_no_plots(tmp_path: Path) -> None:
    plots.draw_plots(tmp_path, 10)
    assert list(tmp_path.iterdir()) == []
