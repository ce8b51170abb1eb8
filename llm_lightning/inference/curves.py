"""The learning curves of a run, drawn from its metrics.csv."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from llm_lightning.files.metrics_csv import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "loss": ("train/loss", "val/loss"),
    "reward margin": ("*/reward_margin",),
    "reward accuracy": ("*/reward_accuracy",),
    "rewards": ("*/chosen_reward", "*/rejected_reward"),
}
Curves = dict[str, list[tuple[int, float]]]
"""metric -> (step, value)"""


def read_curves(run: Path, *, is_required: bool) -> Curves:
    """Read the curves of a run that `PANELS` names; empty where the folder is not a run and none is required.

    Raises:
        FileNotFoundError: if curves are required and there is no metrics.csv.
        ValueError: if the file is damaged, or has none of the metrics and one is required.
    """
    file = run / "metrics.csv"
    if not file.is_file():
        if is_required:
            raise FileNotFoundError(f"--curves {run}: {file} does not exist; name the folder of a run")
        return {}
    try:
        metrics = read_metrics(file)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file} is not the metrics file of a run ({type(error).__name__}: {error})") from error
    curves = {name: values for names in PANELS.values() for name, values in _matching(metrics, names).items()}
    if is_required and not curves:
        raise ValueError(f"--curves {run}: {file} has no loss and no rewards; there are {', '.join(metrics) or 'none'}")
    return curves


def draw_curves(curves: Curves) -> Figure:
    """One panel for each of `PANELS` that has a curve."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    panels = {title: shown for title, names in PANELS.items() if (shown := _matching(curves, names))}
    figure = Figure(figsize=(7, 3 * len(panels)), layout="constrained")
    drawn = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (title, shown) in zip(drawn, panels.items(), strict=True):
        for name, values in shown.items():
            # The row of step s is written after s + 1 updates.
            steps = [step + 1 for step, _ in values]
            axes.plot(steps, [value for _, value in values], label=name, marker="." if len(steps) < 50 else None)
        axes.set_ylabel(title)
        axes.legend()
        axes.grid(alpha=0.3)
    drawn[-1].set_xlabel("updates")
    return figure


def _matching(curves: Curves, patterns: Sequence[str]) -> Curves:
    return {name: curves[name] for pattern in patterns for name in curves if fnmatchcase(name, pattern)}
