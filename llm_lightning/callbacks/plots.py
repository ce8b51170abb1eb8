"""`plots/loss.png`, `accuracy.png`, `lr.png`, `gradient_norm.png`: drawn from `metrics.csv` during the run.

The last drawing, with the task's own figures, is also in TensorBoard.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from llm_lightning.callbacks.run_logs import TensorBoard
from llm_lightning.files.atomic import write_figure
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.files.pictures import (
    GRADIENT_NORM,
    LEARNING_RATE,
    TRAINING,
    TRAINING_EVALUATED,
    VALIDATION,
    blank,
    draw_curve,
    validation_sets,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = dict[str, list[tuple[int, float]]]

STYLES = {
    "train/{}": (TRAINING, "training"),
    "train/eval_{}": (TRAINING_EVALUATED, "training, dropout off"),
    "val/{}": (VALIDATION, "validation"),
}
"""Curve -> its colour and name; {} is the metric."""
ACCURACIES = ("accuracy", "reward_accuracy")


class Plots(L.Callback):
    """Draw the curves after a validation and at the end. A plot that cannot be drawn costs one warning, not the run.

    Args:
        every_n_seconds: shortest time between two drawings; one takes a fraction of a second.
    """

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        self.every_n_seconds = every_n_seconds
        self._drawn, self._took = -math.inf, 0.0
        self._is_broken = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        # The curves grow with the run, and so does the time of a drawing: at most a tenth of the run's.
        if time.monotonic() - self._drawn >= max(self.every_n_seconds, 9 * self._took):
            self.draw(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.draw(trainer, is_last=not trainer.datamodule.test_samples)  # type: ignore[attr-defined]

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.draw(trainer, is_last=True)

    def draw(self, trainer: L.Trainer, *, is_last: bool = False) -> None:
        """Draw the curves and the figures of the task, if there are any.

        Args:
            is_last: add them to TensorBoard: only after the last step, because a killed run that continues would log
                a picture of an earlier step twice.
        """
        if not trainer.is_global_zero or self._is_broken:
            return
        started = time.monotonic()
        for logger in trainer.loggers:
            logger.save()
        boards = [logger for logger in trainer.loggers if is_last and isinstance(logger, TensorBoard)]
        try:
            steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            drawn = draw_plots(Path(trainer.default_root_dir), steps_per_epoch, trainer.lightning_module.figures())  # type: ignore[operator]
            for board in boards:
                for name, png in drawn.items():
                    board.log_picture(f"plots/{name}", png, trainer.global_step)
        except Exception as error:  # of matplotlib, a font or a full disk
            rank_zero_warn(f"no plots: {type(error).__name__}: {error}")
            self._is_broken = True
        self._drawn = time.monotonic()
        self._took = self._drawn - started


def draw_plots(run_dir: Path, steps_per_epoch: int, others: Mapping[str, Figure] | None = None) -> dict[str, bytes]:
    """Draw the curves in `metrics.csv` of `run_dir`, and `others`, into `run_dir/plots`; return the PNGs by name."""
    metrics = run_dir / "metrics.csv"
    figures = curve_figures(read_metrics(metrics), steps_per_epoch) if metrics.is_file() else {}
    figures |= others or {}
    if figures:
        (run_dir / "plots").mkdir(exist_ok=True)
    return {name: write_figure(run_dir / "plots" / f"{name}.png", figure) for name, figure in figures.items()}


def curve_figures(curves: Curves, steps_per_epoch: int) -> dict[str, Figure]:
    """name -> figure, of the curves that there are."""
    figures = {}
    if _curves_of("loss", curves):
        figures["loss"] = loss_figure(curves, steps_per_epoch)
    for name in ACCURACIES:
        if f"val/{name}" in curves:
            figures["accuracy"] = accuracy_figure(name, curves, steps_per_epoch)
    if "lr" in curves:
        figures["lr"] = lr_figure(curves)
    if "train/grad_norm" in curves:
        figures["gradient_norm"] = gradient_norm_figure(curves)
    return figures


def loss_figure(curves: Curves, steps_per_epoch: int) -> Figure:
    """Losses over epochs, with the tokens seen on a second axis above, as the book's chapter 5 draws them."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = blank("Loss during training")
    _draw_over_epochs(axes, "loss", curves, steps_per_epoch)
    counted = next((name for name in curves if name.endswith("_seen")), None)
    if counted is not None:
        step, seen = curves[counted][-1]
        per_epoch = seen / (step + 1) * steps_per_epoch
        above = axes.secondary_xaxis(
            "top", functions=(lambda epochs: epochs * per_epoch, lambda items: items / per_epoch)
        )
        above.set_xlabel(counted.replace("_", " "))
        above.xaxis.set_major_formatter("{x:,.0f}")
        above.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel(f"loss (nats per {_item(curves)})")
    return figure


def accuracy_figure(name: str, curves: Curves, steps_per_epoch: int) -> Figure:
    """Accuracies over epochs."""
    words = name.replace("_", " ")
    figure, axes = blank(f"{words.capitalize()} during training")
    _draw_over_epochs(axes, name, curves, steps_per_epoch)
    axes.set_ylabel(f"{words} (share of {_item(curves)}s)")
    return figure


def lr_figure(curves: Curves) -> Figure:
    """The learning rate over updates."""
    figure, axes = blank("Learning rate during training")
    draw_curve(axes, curves["lr"], LEARNING_RATE, "learning rate", is_noisy=False)
    axes.set(xlabel="updates", ylabel="learning rate (step size)")
    axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    axes.grid(alpha=0.3)
    return figure


def gradient_norm_figure(curves: Curves) -> Figure:
    """The gradient's norm over updates; on a logarithmic axis if it spans orders of magnitude."""
    figure, axes = blank("Gradient norm during training")
    points = curves["train/grad_norm"]
    draw_curve(axes, points, GRADIENT_NORM, "gradient norm", is_noisy=True)
    norms = sorted(norm for _, norm in points if norm > 0)
    if norms and norms[-1] > 100 * norms[len(norms) // 2]:
        axes.set_yscale("log")
    axes.set(xlabel="updates", ylabel="L2 norm before clipping")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    return figure


def _draw_over_epochs(axes: Any, name: str, curves: Curves, steps_per_epoch: int) -> None:
    for metric, (color, label, dashes) in _curves_of(name, curves).items():
        is_noisy = metric.startswith("train/" + name)
        draw_curve(axes, curves[metric], color, label, is_noisy=is_noisy, per=steps_per_epoch, linestyle=dashes)
    axes.set_xlabel("epochs")
    axes.legend(loc="upper right" if name == "loss" else "lower right")  # "best" takes as long as all the rest
    axes.grid(alpha=0.3)


def _curves_of(name: str, curves: Curves) -> dict[str, tuple[str, str, str]]:
    """Curve -> its colour, name and dashes."""
    found = {
        pattern.format(name): (*style, "-") for pattern, style in STYLES.items() if curves.get(pattern.format(name))
    }
    sets = validation_sets(name, curves)
    return found | {metric: (VALIDATION, f"validation: {one}", dashes) for one, metric, dashes in sets}


def _item(curves: Curves) -> str:
    """What the loss is a mean over: a token, a sequence, a pair."""
    return next((name.removesuffix("s_seen") for name in curves if name.endswith("s_seen")), "target")
