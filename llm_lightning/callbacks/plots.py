"""`plots/loss.png` and `plots/lr.png`, drawn from `metrics.csv` during the run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from llm_lightning.callbacks.run_logs import TensorBoard
from llm_lightning.files.atomic import write_figure
from llm_lightning.files.metrics_csv import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = dict[str, list[tuple[int, float]]]

LOSSES = {
    "train/loss": "training, each logged step",
    "train/eval_loss": "training, dropout off",
    "val/loss": "validation",
}
ACCURACIES = {"train/eval_accuracy": "training", "val/accuracy": "validation"}


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
        self.draw(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.draw(trainer)

    def draw(self, trainer: L.Trainer) -> None:
        """Draw the curves and the figures of the task, if there are any."""
        if not trainer.is_global_zero or self._is_broken:
            return
        started = time.monotonic()
        for logger in trainer.loggers:
            logger.save()
        try:
            steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            draw_plots(Path(trainer.default_root_dir), steps_per_epoch)
            self._draw_figures(trainer)
        except Exception as error:  # of matplotlib, a font or a full disk
            rank_zero_warn(f"no plots: {type(error).__name__}: {error}")
            self._is_broken = True
        self._drawn = time.monotonic()
        self._took = self._drawn - started

    def _draw_figures(self, trainer: L.Trainer) -> None:
        folder = Path(trainer.default_root_dir) / "plots"
        for name, figure in trainer.lightning_module.figures().items():  # type: ignore[operator]
            folder.mkdir(exist_ok=True)
            write_figure(folder / f"{name}.png", figure)
            for logger in trainer.loggers:
                # Only after the last step: a killed run that continues would log a picture of an earlier step twice.
                if isinstance(logger, TensorBoard) and trainer.state.fn == "test":
                    logger.log_figure(name, figure, trainer.global_step)


def draw_plots(run_dir: Path, steps_per_epoch: int) -> None:
    """Draw the curves in `metrics.csv` of `run_dir` into `run_dir/plots`."""
    metrics = run_dir / "metrics.csv"
    if not metrics.is_file():
        return
    curves = read_metrics(metrics)
    (run_dir / "plots").mkdir(exist_ok=True)
    if any(name in curves for name in LOSSES):
        write_figure(run_dir / "plots" / "loss.png", loss_figure(curves, steps_per_epoch))
    if any(name in curves for name in ACCURACIES):
        write_figure(run_dir / "plots" / "accuracy.png", accuracy_figure(curves, steps_per_epoch))
    if "lr" in curves:
        write_figure(run_dir / "plots" / "lr.png", lr_figure(curves))


def loss_figure(curves: Curves, steps_per_epoch: int) -> Figure:
    """Losses over epochs, with the tokens seen on a second axis above, as the book's chapter 5 draws them."""
    figure, axes = _figure()
    for name, label in LOSSES.items():
        if name in curves:
            # The row of step s is written after s + 1 updates.
            epochs = [(step + 1) / steps_per_epoch for step, _ in curves[name]]
            style = {"alpha": 0.4} if name == "train/loss" else {"marker": "."}
            axes.plot(epochs, [value for _, value in curves[name]], label=label, **style)  # type: ignore[arg-type]
    axes.set_xlabel("epochs")
    axes.legend()
    counted = next((name for name in ("tokens_seen", "sequences_seen") if curves.get(name)), None)
    if counted is not None:
        step, seen = curves[counted][-1]
        per_epoch = seen / (step + 1) * steps_per_epoch
        above = axes.secondary_xaxis(
            "top", functions=(lambda epochs: epochs * per_epoch, lambda items: items / per_epoch)
        )
        above.set_xlabel(counted.replace("_", " "))
    axes.set_ylabel("loss (nats per token)" if counted == "tokens_seen" else "loss (nats)")
    return figure


def accuracy_figure(curves: Curves, steps_per_epoch: int) -> Figure:
    """Accuracies over epochs."""
    figure, axes = _figure()
    for name, label in ACCURACIES.items():
        if name in curves:
            epochs = [(step + 1) / steps_per_epoch for step, _ in curves[name]]
            axes.plot(epochs, [value for _, value in curves[name]], label=label, marker=".")
    axes.set_xlabel("epochs")
    axes.set_ylabel("accuracy")
    axes.legend()
    return figure


def lr_figure(curves: Curves) -> Figure:
    """The learning rate over steps."""
    figure, axes = _figure()
    axes.plot([step for step, _ in curves["lr"]], [value for _, value in curves["lr"]])
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    return figure


def _figure() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes
