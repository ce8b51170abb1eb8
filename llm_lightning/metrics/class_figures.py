"""Pictures of a classifier's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torchmetrics.functional import classification as measures

from llm_lightning.files.pictures import TEST, VALIDATION, blank
from llm_lightning.metrics.classes import ConfusedPair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME_WIDTH = 40


def split_of(stage: str) -> tuple[str, str]:
    """The name of the split of a stage (`val`, `val/<name>` or `test`), and its colour."""
    if stage == "test":
        return "test", TEST
    _, _, name = stage.partition("/")
    return f"validation ({name})" if name else "validation", VALIDATION


def confusion_figure(matrix: Tensor, labels: Sequence[str], stage: str) -> Figure:
    """Counts of true against predicted classes, from a (K, K) matrix."""
    figure, axes = blank(f"Confusion matrix, {split_of(stage)[0]} texts", (5, 4))
    image = axes.imshow(matrix, cmap="Blues", vmin=0)
    figure.colorbar(image, label="texts")
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=45 if len(labels) > 4 else 0)
    axes.set_yticks(ticks, labels)
    if len(labels) <= 20:
        for row in ticks:
            for column in ticks:
                count = int(matrix[row, column])
                dark = count > matrix.max() / 2
                axes.text(column, row, f"{count:,}", ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def roc_figure(scores: Tensor, labels: Tensor, stage: str) -> Figure:
    """True against false positive rate over all thresholds: (N,) scores of the second of two classes."""
    false_positive, true_positive, _ = measures.binary_roc(scores, labels)
    split, color = split_of(stage)
    figure, axes = blank(f"ROC curve, {split} texts", (4.5, 4))
    axes.plot(false_positive, true_positive, color=color, label=split)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
    axes.legend()
    axes.grid(alpha=0.3)
    axes.set(xlabel="false positive rate (share of the first class)")
    axes.set(ylabel="true positive rate (share of the second class)")
    return figure


def confused_figure(pairs: Sequence[ConfusedPair], stage: str) -> Figure:
    """Bars: the number of texts of the first class predicted as the second."""
    split, color = split_of(stage)
    title = f"{'Most confused classes' if pairs else 'No confused classes'}, {split} texts"
    figure, axes = blank(title, (7, 1.2 + 0.25 * max(len(pairs), 4)))
    places = range(len(pairs))
    axes.barh(places, [pair.texts for pair in pairs], color=color)
    axes.set_yticks(places, [f"{_short(pair.true)} as {_short(pair.predicted)}" for pair in pairs])
    axes.invert_yaxis()
    axes.set(xlabel="texts", ylabel="true class as predicted class")
    return figure


def _short(name: str) -> str:
    cut = name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}..."
    return cut.replace("$", r"\$")  # matplotlib would take it for mathematics
