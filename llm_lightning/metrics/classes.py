"""Precision, recall, F1, AUROC and confusions of a classifier.

Above `MOST_SHOWN` classes, memory does not grow with the square of K.

Letters: N texts, K classes, B classes of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import classification as measures

MOST_SHOWN = 100
"""Most classes with a confusion matrix; above it, only the most confused pairs are shown."""
PAIRS_SHOWN = 20
AT_ONCE = 1 << 21
"""Scores sorted at once: 8 MiB in float32, and memory for a few copies."""
Columns = Callable[[Tensor], Tensor]
"""(B,) indices of classes -> scores of all texts for each of them, (N, B)."""


class ConfusedPair(NamedTuple):
    """Texts of one class that were classified as another."""

    true: str
    predicted: str
    texts: int
    of: int
    """all texts of the true class"""


def count_metrics(predicted: Tensor, labels: Tensor, n_classes: int) -> dict[str, float]:
    """Precision, recall and F1: of the second class if there are two, else the mean over classes.

    As in torchmetrics and scikit-learn, the mean leaves out a class that has no texts and was never predicted, and
    0 / 0 is 0.

    Args:
        predicted, labels: (N,) int64 on the CPU.
    """
    correct = torch.bincount(labels[predicted == labels], minlength=n_classes).float()
    positive = torch.bincount(predicted, minlength=n_classes).float()
    actual = torch.bincount(labels, minlength=n_classes).float()
    ratios = {"precision": (correct, positive), "recall": (correct, actual), "f1": (2 * correct, positive + actual)}
    seen = (positive + actual > 0).float()
    return {name: _reduced(_divided(*ratio), seen) for name, ratio in ratios.items()}


def _divided(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0.0)


def _reduced(of_class: Tensor, seen: Tensor) -> float:
    if len(of_class) == 2:
        return float(of_class[1])
    return float((seen * of_class / seen.sum().clamp(min=1)).sum())


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: of the second class if there are two, else the mean of each class against the rest.

    The area of a class of no text or of every text is undefined: the mean leaves it out; 0 if no class is left.

    Args:
        scores: (N, K) probabilities.
        labels: (N,) int64.
    """
    if scores.size(1) == 2:
        return float(measures.binary_auroc(scores[:, 1], labels)) if _defined(labels, scores) else 0.0
    areas = [measures.binary_auroc(scores[:, index], (labels == index).long()) for index in _defined(labels, scores)]
    return float(torch.stack(areas).mean()) if areas else 0.0


def _defined(labels: Tensor, scores: Tensor) -> list[int]:
    counts = torch.bincount(labels, minlength=scores.size(1))
    return ((counts > 0) & (counts < len(labels))).nonzero()[:, 0].tolist()


def auroc_of_many(columns: Columns, labels: Tensor, n_classes: int) -> float:
    """`auroc` without a second array as large as the scores.

    The area is the probability that a text of the class outscores any other text; a tie counts half (Hanley and McNeil
    1982).
    """
    counts = torch.bincount(labels, minlength=n_classes)
    defined = ((counts > 0) & (counts < len(labels))).nonzero()[:, 0]
    members = labels.argsort(stable=True).numpy()  # the texts of class 0, then those of class 1 ...
    ends = counts.cumsum(0).tolist()
    areas: list[float] = []
    size = max(1, AT_ONCE // max(len(labels), 1))
    ordered = np.zeros((size, len(labels)))
    for block in defined.split(size):
        scores = columns(block).numpy()  # (N, B)
        if ordered.dtype != scores.dtype:
            ordered = np.zeros(ordered.shape, scores.dtype)
        np.copyto(ordered[: len(block)], scores.T)
        ordered[: len(block)].sort(axis=1)
        for row, index in enumerate(block.tolist()):
            of_class = members[ends[index] - int(counts[index]) : ends[index]]
            areas.append(_area(ordered[row], scores[of_class, row]))
    return float(np.mean(areas)) if areas else 0.0


def _area(ordered: np.ndarray, own: np.ndarray) -> float:
    """The area, from all scores, (N,) ascending, and the scores of the class's own texts, in any order."""
    below = np.searchsorted(ordered, own, "left").sum(dtype=np.float64)
    not_above = np.searchsorted(ordered, own, "right").sum(dtype=np.float64)
    among_themselves = len(own) ** 2 / 2
    return float(((below + not_above) / 2 - among_themselves) / (len(own) * (len(ordered) - len(own))))


def softmax_columns(logits: Tensor) -> Columns:
    """Columns of the softmax of `logits`, computed on demand.

    Args:
        logits: (N, K).
    """
    peak = logits.amax(1, keepdim=True) if len(logits) else logits[:, :1]
    total = torch.zeros_like(peak)
    size = max(1, AT_ONCE // logits.size(1))
    # One buffer for all blocks: some allocators do not reuse memory freed between small results.
    shifted = logits.new_zeros(min(size, len(logits)), logits.size(1))
    for rows, top, whole in zip(logits.split(size), peak.split(size), total.split(size), strict=True):
        part = shifted[: len(rows)]
        torch.sub(rows, top, out=part)
        whole.copy_(part.exp_().sum(1, keepdim=True))

    def columns(block: Tensor) -> Tensor:
        return logits[:, block].sub_(peak).exp_().div_(total)

    return columns


def confusion(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """(K, K) int64 counts: rows are true classes, columns predicted ones. For at most `MOST_SHOWN` classes."""
    return torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).view(n_classes, n_classes)


def most_confused(
    predicted: Tensor, labels: Tensor, names: Sequence[str], most: int = PAIRS_SHOWN
) -> list[ConfusedPair]:
    """The most frequently confused pairs of classes; ties keep the order of the classes."""
    wrong = predicted != labels
    pairs, counts = (labels[wrong] * len(names) + predicted[wrong]).unique(return_counts=True)  # ascending
    of_class = torch.bincount(labels, minlength=len(names))
    chosen = counts.argsort(descending=True, stable=True)[:most]
    return [
        ConfusedPair(names[pair // len(names)], names[pair % len(names)], count, int(of_class[pair // len(names)]))
        for pair, count in zip(pairs[chosen].tolist(), counts[chosen].tolist(), strict=True)
    ]


def described_confusions(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[str, Any]:
    """(name, plain values): the matrix `confusion`, or for many classes the pairs `most_confused`."""
    if len(names) > MOST_SHOWN:
        return "most_confused", [pair._asdict() for pair in most_confused(predicted, labels, names)]
    return "confusion", confusion(predicted, labels, len(names)).tolist()
