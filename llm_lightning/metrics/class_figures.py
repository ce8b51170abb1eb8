"""Pictures of a classifier's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torchmetrics.functional import classification as measures

from llm_lightning.metrics.classes import ConfusedPair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME_WIDTH = 40


def confusion_figure(matrix: Tensor, labels: Sequence[str], stage: str) -> Figure:
    """Counts of true against predicted classes, from a (K, K) matrix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(matrix, cmap="Blues")
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=45 if len(labels) > 4 else 0)
    axes.set_yticks(ticks, labels)
    if len(labels) <= 20:
        for row in ticks:
            for column in ticks:
                count = int(matrix[row, column])
                dark = count > matrix.max() / 2
                axes.text(column, row, f"{count:,}", ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="predicted", ylabel="true", title=stage)
    return figure


def roc_figure(scores: Tensor, labels: Tensor, stage: str) -> Figure:
    """True against false positive rate over all thresholds: (N,) scores of the second of two classes."""
    from matplotlib.figure import Figure

    false_positive, true_positive, _ = measures.binary_roc(scores, labels)
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(false_positive, true_positive)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.grid(alpha=0.3)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=stage)
    return figure


def confused_figure(pairs: Sequence[ConfusedPair], stage: str) -> Figure:
    """Bars: the number of texts of the first class predicted as the second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.25 * max(len(pairs), 4)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(pairs))
    axes.barh(places, [pair.texts for pair in pairs])
    axes.set_yticks(places, [f"{_short(pair.true)} as {_short(pair.predicted)}" for pair in pairs])
    axes.invert_yaxis()
    axes.set(xlabel="texts", title=f"{stage}: most confused" if pairs else f"{stage}: none confused")
    return figure


def _short(name: str) -> str:
    cut = name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}..."
    return cut.replace("$", r"\$")  # matplotlib would take it for mathematics
