"""`plot_lr=true`: the learning rate of every step of a run, as a figure and a few lines of text."""

from __future__ import annotations

from pathlib import Path

from llm_lightning.files.atomic import write_figure
from llm_lightning.optim.schedules import ScheduleConfig

POINTS = 2000
"""Most points of the curve; more cannot be seen."""


def plot_lr(schedule: ScheduleConfig, peak: float, total_steps: int, path: Path) -> list[str]:
    """Draw a schedule into the PNG file `path`; return its steps and rates in a few lines.

    Raises:
        ValueError: if the schedule does not fit into the run.
    """
    schedule.check(total_steps)
    warmup = schedule.warmup_steps(total_steps)
    stride = -(-total_steps // POINTS)
    drawn = sorted({*range(0, total_steps, stride), warmup, total_steps - 1})
    rates = [schedule.lr_at(step, peak, total_steps) for step in drawn]
    _draw(drawn, rates, warmup, path)
    named = sorted({0, warmup, *(total_steps * quarter // 4 for quarter in (1, 2, 3)), total_steps - 1})
    rows = [f"  step {step:>9,}   {schedule.lr_at(step, peak, total_steps):.3g}" for step in named]
    phases = f"{total_steps:,} steps" + (f", the first {warmup:,} of them warmup" if warmup else "")
    return [f"Learning rate of {phases}:", *rows, f"Drawn: {path}"]


def _draw(steps: list[int], rates: list[float], warmup: int, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title="Learning rate", xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.plot(steps, rates)
    if warmup:
        axes.axvline(warmup, color="grey", linestyle=":")
        axes.annotate(" end of warmup", (warmup, 0), color="grey")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure)
