"""Text classification: a linear head on a GPT's trunk; head, last blocks, everything or adapters are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_lightning.data.batches import ClassificationBatch
from llm_lightning.losses import IGNORE_INDEX, weights_of_classes
from llm_lightning.metrics.class_report import CLASS_METRICS, ClassReport
from llm_lightning.models.classifier import Classifier, train_head, train_only
from llm_lightning.models.gpt import GPT
from llm_lightning.tasks.accounting import gather_rows
from llm_lightning.tasks.base import StepOutput, TaskModule
from llm_lightning.tasks.frozen_blocks import FrozenBlocks


class ClassificationModule(TaskModule):
    """Cross-entropy over classes.

    Args:
        model: a GPT, whose trunk gets a fresh head; or a Classifier, which keeps its own.
        labels, class_counts: names of the classes, in the order of their indices, and training samples of each.
        pooling, causal: see `Classifier`.
        pad_to, pad_id: fixed length of all samples, if the data has one, and id of padding.
        trained_blocks: last blocks trained besides the head: 0, k, `all`, or `auto`: 1 with given weights, else all.
        class_weights: one weight per class, or `balanced`: total / (classes x count).
        tune_threshold: with two classes, choose on validation data the probability from which the second is predicted.
        frozen_cache: keep the output of frozen blocks on disk.
    """

    task, item, uses_lm_head = "classification", "sequence", False
    model: Classifier
    class_weights: Tensor | None

    def __init__(
        self, *, model: GPT | Classifier, labels: Sequence[str], class_counts: Sequence[int], pooling: str = "last",
        causal: bool = True, pad_to: int | None = None, pad_id: int = 0, trained_blocks: int | str = "auto",
        class_weights: Sequence[float] | str | None = None, tune_threshold: bool = False, frozen_cache: bool = True,
        **common: Any,
    ) -> None:  # fmt: skip
        classifier = model if isinstance(model, Classifier) else Classifier(model, len(labels), pooling, causal)
        classifier.check_padding(pad_to)
        is_pretrained = bool(common.get("header", {}).get("lineage", {}).get("parent"))
        train_only(classifier, trained_blocks, is_pretrained=is_pretrained)
        super().__init__(model=classifier, **common)
        if self.lora is not None:
            train_head(classifier)
        self.register_buffer("class_weights", weights_of_classes(class_weights, class_counts), persistent=False)
        self.padding: dict[str, Any] = {"pad_to": pad_to, "pad_id": pad_id}
        self.frozen_blocks = FrozenBlocks(classifier, **self.padding, use_cache=frozen_cache)
        self.report = ClassReport(labels, classifier, tune_threshold=tune_threshold)

    def step_output(self, batch: ClassificationBatch) -> StepOutput:
        logits = self.frozen_blocks.logits(batch.input_ids, batch.lengths)  # (B, K)
        loss_sum = F.cross_entropy(logits, batch.labels, self.class_weights, ignore_index=IGNORE_INDEX, reduction="sum")
        has_label = batch.labels != IGNORE_INDEX
        logits, labels = logits[has_label], batch.labels[has_label]
        predicted = self.model.predict(logits)
        metrics = {"accuracy": ((predicted == labels).sum(), has_label.sum())}
        rows = {"logits": logits, "predicted": predicted, "labels": labels}
        return StepOutput(loss_sum, batch.n_targets, metrics, rows)

    def metric_names(self) -> tuple[str, ...]:
        return ("loss", *CLASS_METRICS)

    def eval_metrics(self, stage: str, means: dict[str, float], outputs: dict[str, Tensor]) -> dict[str, float]:
        return means | self.report.metrics(stage, outputs, gather=lambda rows: gather_rows(self.trainer, rows))

    @property
    def local_outputs(self) -> frozenset[str]:
        return self.report.local_outputs

    @classmethod
    def options_from(cls, datamodule: Any) -> dict[str, Any]:
        samples, labels = datamodule.train_samples, datamodule.labels
        counts = np.bincount([samples[index].label for index in range(len(samples))], minlength=len(labels)).tolist()
        return {"labels": labels, "class_counts": counts, "pad_to": datamodule.pad_to, "pad_id": datamodule.pad_id}

    def describe_model(self) -> dict[str, Any]:
        own = {"labels": self.report.labels, "pooling": self.model.pooling, "causal": self.model.causal}
        return {"classifier": own | self.padding, **super().describe_model()}

    def compile_model(self) -> None:
        self.model.finish = torch.compile(self.model.finish)  # type: ignore[method-assign]

    def configure_callbacks(self) -> list[FrozenBlocks]:
        return [self.frozen_blocks]

    def results(self) -> dict[str, Any]:
        return self.report.facts()

    def figures(self) -> dict[str, Any]:
        return self.report.figures()
