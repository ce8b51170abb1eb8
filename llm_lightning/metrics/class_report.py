"""Everything that an evaluation reports about a classifier, from the logits of its texts.

Letters: N texts, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_lightning.metrics.class_figures import confused_figure, confusion_figure, roc_figure
from llm_lightning.metrics.classes import (
    MOST_SHOWN,
    auroc,
    auroc_of_many,
    confusion,
    count_metrics,
    described_confusions,
    most_confused,
    softmax_columns,
)
from llm_lightning.metrics.intervals import wilson_interval
from llm_lightning.models.classifier import Classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASS_METRICS = ("accuracy", "accuracy_low", "accuracy_high", "precision", "recall", "f1", "auroc")


class ClassReport:
    """The predictions of the last evaluation of each split: metrics, facts for the summary, figures.

    Args:
        labels: names of the K classes.
        classifier: predicts classes from logits; of two classes, with its threshold.
        tune_threshold: with two classes, set that threshold to the best one for the validation split.

    Raises:
        ValueError: if `tune_threshold` has more than two classes.
    """

    def __init__(self, labels: Sequence[str], classifier: Classifier, *, tune_threshold: bool = False) -> None:
        if tune_threshold and len(labels) != 2:
            raise ValueError(f"task.tune_threshold needs two classes, and there are {len(labels)}")
        self.labels, self.classifier, self.tune_threshold = list(labels), classifier, tune_threshold
        self.evaluated: dict[str, dict[str, Tensor]] = {}
        """split -> (N,) `labels` and `predicted`; with two classes also (N, 2) `logits`"""

    @property
    def local_outputs(self) -> frozenset[str]:
        """Logits of many classes stay on their process and are gathered a few classes at a time."""
        return frozenset({"logits"} if len(self.labels) > MOST_SHOWN else ())

    def metrics(
        self, stage: str, outputs: dict[str, Tensor], gather: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> dict[str, float]:
        """`CLASS_METRICS` of one evaluation.

        Args:
            outputs: (N, K) `logits`, (N,) `predicted` and `labels`.
            gather: collects the rows of all processes, for logits that are kept apart.
        """
        logits, predicted, labels = outputs["logits"], outputs["predicted"], outputs["labels"]
        seen = {"labels": labels}
        if len(self.labels) == 2:
            threshold = self.classifier.threshold
            if stage == "val" and self.tune_threshold:
                threshold.fill_(best_threshold(logits.softmax(-1)[:, 1], labels))
            predicted = self.classifier.predict(logits.to(threshold.device)).cpu()  # by the threshold of now
            seen["logits"] = logits
        self.evaluated[stage] = seen | {"predicted": predicted}
        low, high = wilson_interval(int((predicted == labels).sum()), len(labels))
        accuracy = (predicted == labels).double().mean().item()
        values = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
        values |= count_metrics(predicted, labels, len(self.labels))
        if self.local_outputs:
            columns = softmax_columns(logits)
            area = auroc_of_many(lambda block: gather(columns(block)), labels, len(self.labels))
        else:
            area = auroc(logits.softmax(-1), labels)
        return values | {"auroc": area}

    def facts(self) -> dict[str, Any]:
        """Plain values: classes, threshold, and the confusions of each split."""
        threshold = float(self.classifier.threshold) if len(self.labels) == 2 else None
        facts: dict[str, Any] = {"labels": self.labels, "threshold": threshold}
        for stage, seen in self.evaluated.items():
            name, confusions = described_confusions(seen["predicted"], seen["labels"], self.labels)
            facts.setdefault(name, {})[stage] = confusions
        return facts

    def figures(self) -> dict[str, Figure]:
        """name -> picture: a confusion matrix and a ROC curve, or bars of the most confused classes.

        Names are those of files: `val-hard_confusion` is of the stage `val/hard`.
        """
        drawn = {}
        for stage, seen in self.evaluated.items():
            if stage == "train_eval":
                continue
            name = stage.replace("/", "-")
            if len(self.labels) > MOST_SHOWN:
                pairs = most_confused(seen["predicted"], seen["labels"], self.labels)
                drawn[f"{name}_confused"] = confused_figure(pairs, stage)
                continue
            matrix = confusion(seen["predicted"], seen["labels"], len(self.labels))
            drawn[f"{name}_confusion"] = confusion_figure(matrix, self.labels, stage)
            if len(self.labels) == 2 and len(seen["labels"].unique()) == 2:
                drawn[f"{name}_roc"] = roc_figure(seen["logits"].softmax(-1)[:, 1], seen["labels"], stage)
        return drawn


def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The threshold on `scores` (N,) with most right predictions; among equally good ones, the nearest to 0.5.

    Candidates are 0.5 and the middles between neighbouring scores.
    """
    different = scores.double().unique()
    candidates = torch.cat([torch.tensor([0.5], dtype=torch.float64), (different[1:] + different[:-1]) / 2])
    ordered, places = scores.double().sort()
    second = torch.cat([torch.zeros(1, dtype=torch.int64), labels[places].long().cumsum(0)])  # among the first n
    below = torch.searchsorted(ordered, candidates)  # predicted as the first class
    right = below - second[below] + second[-1] - second[below]
    best = candidates[right == right.max()]
    return best[(best - 0.5).abs().argmin()].item()
