from __future__ import annotations

import io
import math
import re
import struct
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from llm_lightning.callbacks import plots
from llm_lightning.callbacks.plots import Plots, curve_figures, loss_figure, lr_figure
from llm_lightning.callbacks.run_logs import MetricsFile
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.files.pictures import smoothed, smoothing_width
from llm_lightning.metrics.class_figures import confusion_figure, roc_figure


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:])  # type: ignore[return-value]


@pytest.mark.slow
def test_plots_are_drawn_from_the_metrics(tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any) -> None:
    trainer = make_trainer(tmp_path, [Plots()], logger=[MetricsFile(tmp_path)], log_every_n_steps=2)
    trainer.fit(make_module(), datamodule=make_data(batch_size=2))
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["gradient_norm.png", "loss.png", "lr.png"]
    for path in (tmp_path / "plots").iterdir():
        assert png_size(path)[0] > 500


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
    # Steps 5 +- 2 of a straight line; the last one has nothing behind it, and stays.
    smooth = lines["training, mean over 4 steps"][1]
    assert (smooth[5], smooth[-1]) == (pytest.approx(4.5), pytest.approx(3.1))
    assert (axes.get_title(), axes.get_ylabel()) == ("Loss during training", "loss (nats per token)")
    (above,) = axes.child_axes
    assert (axes.get_xlabel(), above.get_xlabel()) == ("epochs", "tokens seen")
    figure.savefig(io.BytesIO())
    assert above.get_xlim() == pytest.approx([1000 * limit for limit in axes.get_xlim()])  # 1,000 tokens an epoch
    assert list(lr_figure(read_metrics(metrics.path)).axes[0].get_lines()[0].get_ydata()) == [0.1] * 20


def test_further_validation_sets_are_in_the_picture_of_their_metric() -> None:
    names = ["val/loss", "val/hard/loss", "val/a-b_1/loss", "val/hard/accuracy", "val/accuracy"]
    curves = {name: [(9, float(number)), (19, 0.5)] for number, name in enumerate(names)}
    figures = curve_figures(curves, 10)
    lines = {
        name: {line.get_label(): (line.get_linestyle(), line.get_ydata()[0]) for line in figure.axes[0].get_lines()}
        for name, figure in figures.items()
    }
    assert lines == {
        "loss": {"validation": ("-", 0.0), "validation: hard": ("--", 1.0), "validation: a-b_1": (":", 2.0)},
        "accuracy": {"validation": ("-", 4.0), "validation: hard": ("--", 3.0)},
    }


@pytest.mark.slow
def test_one_colour_has_one_meaning() -> None:
    """In every plot, each of which has a title and names both axes."""
    names = [f"{stage}{metric}" for stage in ("train/", "train/eval_", "val/") for metric in ("loss", "accuracy")]
    curves = {name: [(step, 0.5) for step in range(30)] for name in [*names, "lr", "train/grad_norm", "pairs_seen"]}
    scores, labels = torch.tensor([0.2, 0.8, 0.4]), torch.tensor([0, 1, 1])
    figures = curve_figures(curves, 10) | {stage: roc_figure(scores, labels, stage) for stage in ("val", "test")}
    figures["matrix"] = confusion_figure(torch.eye(2), ["a", "b"], "val")
    meanings: dict[str, set[str]] = {}
    for figure in figures.values():
        axes = figure.axes[0]
        assert "" not in (axes.get_title(), axes.get_xlabel(), axes.get_ylabel())
        for line in axes.get_lines():
            meanings.setdefault(line.get_color(), set()).add(line.get_label().removesuffix(", each logged step"))
    assert {color: {re.sub(", mean over .*", "", label) for label in found} for color, found in meanings.items()} == {
        "#0072b2": {"training"},
        "#56b4e9": {"training, dropout off"},
        "#d55e00": {"validation"},
        "#e69f00": {"test"},
        "#009e73": {"learning rate"},
        "#aa4499": {"gradient norm"},
        "grey": {"chance"},
    }


def test_a_smoothed_curve_is_the_mean_of_its_window() -> None:
    """Narrower near the ends, and also where steps are missing; pandas has the same for even steps."""
    values = pandas.Series([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
    means = {width: values.rolling(width, center=True).mean() for width in (1, 3, 5)}
    expected = [means[1][0], means[3][1], *means[5][2:6], means[3][6], means[1][7]]
    assert smoothed(range(8), list(values), 4) == pytest.approx(expected)
    assert smoothed([0, 10, 11, 30], [1.0, 2.0, 4.0, 8.0], 4) == pytest.approx([1.0, 3.0, 3.0, 8.0])
    overflowed = [math.inf, *values, math.nan]
    assert smoothed(range(10), overflowed, 2)[2:-2] == pytest.approx(smoothed(range(8), list(values), 2)[1:-1])
    assert (smoothing_width(range(9)), smoothing_width(range(0, 2000, 10))) == (None, 100)


@pytest.mark.slow
def test_plots_are_drawn_at_most_so_often(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(plots, "draw_plots", lambda folder, *_: drawn.append(folder) or {})
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
