"""What all pictures of training have in common: one colour for one meaning, and one way to smooth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart with any kind of colour blindness: Okabe and Ito 2008, "Color universal design"; the last one is Tol's.
TRAINING = "#0072b2"
TRAINING_EVALUATED = "#56b4e9"
"""Training samples, dropout off."""
VALIDATION = "#d55e00"
TEST = "#e69f00"
LEARNING_RATE = "#009e73"
GRADIENT_NORM = "#aa4499"

DASHES = ("--", ":", "-.")
"""Of further validation sets, in the colour of validation: their names tell more than three apart."""

MARKED = 50
"""Points up to which each has a dot."""
SMOOTHED_SHARE = 0.05
"""Of a training curve: the width of the window over which it is smoothed."""
FEWEST = 10
"""Points from which on a curve is smoothed."""


def validation_sets(name: str, curves: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(set, its curve, its dashes) of each further validation set that has a metric: `val/SET/loss`."""
    sets = [metric for metric in curves if metric.startswith("val/") and metric.endswith(f"/{name}")]
    named = (
        (metric.removeprefix("val/").removesuffix(f"/{name}"), metric) for metric in sets if metric.count("/") == 2
    )
    for (one, metric), dashes in zip(named, cycle(DASHES), strict=False):
        yield one, metric, dashes


def smoothing_width(steps: Sequence[float]) -> int | None:
    """The steps over which a curve is averaged: a twentieth of it, and five points at least; None if it has few."""
    if len(steps) < FEWEST:
        return None
    span = steps[-1] - steps[0]
    return round(max(SMOOTHED_SHARE * span, 4 * span / (len(steps) - 1)))


def smoothed(steps: Sequence[float], values: Sequence[float], width: float) -> np.ndarray:
    """The mean of the values within `width` / 2 steps before and after each one.

    Near an end the window shrinks on both sides, so that no part of a curve is shifted. Values that are not finite, as
    gradients in float16 have, are left out.
    """
    at, raw = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    finite = np.isfinite(raw)
    sums, counts = (np.concatenate([[0.0], np.cumsum(one)]) for one in (np.where(finite, raw, 0.0), finite))
    reach = np.minimum(width / 2, np.minimum(at - at[0], at[-1] - at))
    first, after = np.searchsorted(at, at - reach), np.searchsorted(at, at + reach, side="right")
    n = counts[after] - counts[first]
    mean: np.ndarray = np.where(n > 0, (sums[after] - sums[first]) / np.maximum(n, 1), np.nan)
    return mean


def blank(title: str, size: tuple[float, float] | None = None) -> tuple[Figure, Any]:
    """A figure and its axes, titled and empty.

    Args:
        size: in inches, for labels of any length; by default that of curves, whose fixed margins are drawn in half the
            time.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=size or (7, 4.5), layout="constrained" if size else None)
    if size is None:
        figure.subplots_adjust(left=0.13, right=0.96, bottom=0.11, top=0.85)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def draw_curve(
    axes: Any, points: Sequence[tuple[int, float]], color: str, label: str, *, is_noisy: bool, per: float = 1,
    **style: Any,
) -> None:  # fmt: skip
    """Draw one curve. A noisy one is a line over its raw points, and the legend says how it was smoothed.

    Args:
        per: steps of one unit of the x axis.
    """
    steps, values = [step for step, _ in points], [value for _, value in points]
    at = [(step + 1) / per for step in steps]  # the row of step s is written after s + 1 updates
    width = smoothing_width(steps) if is_noisy else None
    if width is None:
        axes.plot(at, values, color=color, label=label, marker="." if len(at) < MARKED else None, **style)
        return
    axes.plot(at, values, color=color, alpha=0.3, linewidth=0.6, antialiased=False, label=f"{label}, each logged step")
    axes.plot(at, smoothed(steps, values, width), color=color, label=f"{label}, mean over {width:,} steps", **style)
