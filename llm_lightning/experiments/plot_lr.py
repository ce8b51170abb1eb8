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
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return [f"Learning rate of {phases}:", *rows, f"Drawn: {shown}"]


def _draw(steps: list[int], rates: list[float], warmup: int, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=f"Learning rate of {steps[-1] + 1:,} steps", xlabel="step", ylabel="learning rate")
    axes.grid(alpha=0.3)
    axes.plot(steps, rates)
    axes.set_ylim(0, 1.1 * max(rates))
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    if warmup:
        axes.axvline(warmup, color="grey", linestyle=":")
        axes.annotate(f" warmup ends at step {warmup:,}", (warmup, 0.03 * max(rates)), color="grey")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure)
