"""The learning curves of one run or two, drawn from their metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.files.pictures import TRAINING, VALIDATION, draw_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "loss": ("train/loss", "val/loss", "val/*/loss"),
    "reward margin": ("*/reward_margin",),
    "reward accuracy": ("*/reward_accuracy",),
    "rewards": ("*/chosen_reward", "*/rejected_reward"),
}
UNITS = {
    "loss": "nats per token or pair",
    "reward margin": "nats",
    "reward accuracy": "share of pairs",
    "rewards": "nats",
}
DASHES = (("-", ":"), ("--", "-."))
"""Of each run: its lines, and those of rejected answers."""
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


def draw_curves(runs: Mapping[str, Curves]) -> Figure:
    """Draw one panel for each of `PANELS` that has a curve; colours say what a line is, dashes whose it is.

    Args:
        runs: name -> curves of one or two runs.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    panels = [title for title, names in PANELS.items() if any(_matching(curves, names) for curves in runs.values())]
    figure = Figure(figsize=(8, 1 + 3.2 * len(panels)), layout="constrained")
    drawn = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, title in zip(drawn, panels, strict=True):
        for (run, curves), dashes in zip(runs.items(), DASHES, strict=False):
            for name, points in _matching(curves, PANELS[title]).items():
                _draw(axes, run, name, points, dashes)
        axes.set(title=title.capitalize(), ylabel=f"{title} ({UNITS[title]})")
        _legend(axes)
        axes.grid(alpha=0.3)
    drawn[-1].set_xlabel("updates")
    return figure


def _draw(axes: Any, run: str, name: str, points: Sequence[tuple[int, float]], dashes: tuple[str, str]) -> None:
    stage, *sets, metric = name.split("/")
    color, split = (TRAINING, "training") if stage == "train" else (VALIDATION, ": ".join(["validation", *sets]))
    what = "rejected, " if metric == "rejected_reward" else "chosen, " if metric == "chosen_reward" else ""
    line = dashes[metric == "rejected_reward"]
    draw_curve(axes, points, color, f"{run}: {what}{split}", is_noisy=stage == "train", linestyle=line)


def _legend(axes: Any) -> None:
    for text in axes.legend(fontsize="small").get_texts():
        text.set_parse_math(False)  # a name of a run may have two dollar signs


def _matching(curves: Curves, patterns: Sequence[str]) -> Curves:
    return {name: curves[name] for pattern in patterns for name in curves if fnmatchcase(name, pattern)}
