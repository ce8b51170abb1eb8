"""Text classification: a linear head on a GPT's trunk; the head, the last blocks, everything or adapters are trained.

Blocks below the first trained one compute the same for every epoch and run, so what they give is computed once and
kept on disk (`frozen_cache.py`): training then runs only what is trained. What they compute is the same either way.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import classification as measures

from llm_lightning.data.batches import ClassificationBatch, LabelledSample
from llm_lightning.files.frozen_cache import FrozenCache, FrozenCacheError, weights_digest
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.metrics.classes import (
    MOST_SHOWN,
    auroc,
    auroc_of_many,
    confused_figure,
    confusion,
    count_metrics,
    described_confusions,
    most_confused,
    softmax_columns,
)
from llm_lightning.metrics.intervals import wilson_interval
from llm_lightning.models.classifier import Classifier, frozen_depth, train_only
from llm_lightning.models.gpt import GPT
from llm_lightning.models.lora import LoRALinear
from llm_lightning.tasks.base import StepOutput, TaskModule, give_back_freed_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 1024
"""Tokens that frozen blocks compute at once, padding included: enough for a CPU, and little memory."""


class ClassificationModule(TaskModule):
    """Cross-entropy over classes, and what is told of a classifier: accuracy with its interval, F1, AUROC.

    Args:
        model: a GPT, whose trunk gets a fresh head; or a Classifier, which goes on with its own.
        labels: names of the classes, in the order of their indices.
        class_counts: training samples of each class.
        pooling, causal: see `Classifier`.
        pad_to, pad_id: the fixed length of all samples, if the data has one, and what fills them up.
        trained_blocks: 0: the head alone; k: also the last k blocks and the final norm; `all`; `auto`: 1 where
            weights were given to start from, else all. Adapters (`lora`) take its place, and the head is then trained
            too, unless an adapter stands on it.
        class_weights: one weight per class, or `balanced`: total / (classes x count).
        tune_threshold: of two classes, choose the probability from which the second is said on validation data.
        frozen_cache: keep what frozen blocks compute.
    """

    task, item = "classification", "sequence"
    uses_lm_head = False
    model: Classifier

    def __init__(
        self,
        *,
        model: GPT | Classifier,
        labels: Sequence[str],
        class_counts: Sequence[int],
        pooling: str = "last",
        causal: bool = True,
        pad_to: int | None = None,
        pad_id: int = 0,
        trained_blocks: int | str = "auto",
        class_weights: Sequence[float] | str | None = None,
        tune_threshold: bool = False,
        frozen_cache: bool = True,
        **common: Any,
    ) -> None:
        self.labels, self.pad_to, self.pad_id = list(labels), pad_to, pad_id
        classifier = model
        if isinstance(model, GPT):
            classifier = Classifier(model, len(labels), pooling=pooling, causal=causal)
        assert isinstance(classifier, Classifier)
        if classifier.reads_pads and pad_to is None:
            raise ValueError(
                f"task.pooling={pooling} reads the padding, which then must not depend on the batch; "
                "set data.pad_to (longest_train, context or a number), or task.pooling=last"
            )
        if trained_blocks == "auto":
            trained_blocks = 1 if common.get("header", {}).get("lineage", {}).get("parent") else "all"
        if trained_blocks != "all":
            train_only(classifier, _number_of_blocks(trained_blocks))
        super().__init__(model=classifier, **common)
        if self.lora is not None and not isinstance(classifier.head, LoRALinear):
            classifier.head.requires_grad_(True)
        if tune_threshold and len(self.labels) != 2:
            raise ValueError(f"task.tune_threshold needs two classes, and there are {len(self.labels)}")
        self.tune_threshold, self.use_cache = tune_threshold, frozen_cache
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", _class_weights(class_weights, class_counts), persistent=False)
        self.depth = frozen_depth(classifier)
        self._stored: FrozenCache | None = None
        self._seen: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def options_from(cls, datamodule: Any) -> dict[str, Any]:
        counts = [0] * len(datamodule.labels)
        for index in range(len(datamodule.train_samples)):
            counts[datamodule.train_samples[index].label] += 1
        data = {"pad_to": datamodule.pad_to, "pad_id": datamodule.pad_id}
        return {"labels": datamodule.labels, "class_counts": counts, **data}

    def describe_model(self) -> dict[str, Any]:
        model = self.model
        described = {"labels": self.labels, "pooling": model.pooling, "causal": model.causal}
        padding = {"pad_to": self.pad_to, "pad_id": self.pad_id}
        return {"classifier": described | padding, **super().describe_model()}

    def compile_model(self) -> None:
        self.model.finish = torch.compile(self.model.finish)  # type: ignore[method-assign]

    # --- one batch -------------------------------------------------------------------------------------------------

    def step_output(self, batch: ClassificationBatch) -> StepOutput:
        logits = self.logits(batch.input_ids, batch.lengths).float()  # (B, K)
        loss_sum = F.cross_entropy(
            logits, batch.labels, weight=self.class_weights, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        real = batch.labels != IGNORE_INDEX
        predicted = self.model.predict(logits)
        right = (predicted == batch.labels)[real]
        return StepOutput(
            loss_sum,
            batch.n_targets,
            metrics={"accuracy": (right.sum(), real.sum())},
            outputs={"logits": logits[real], "predicted": predicted[real], "labels": batch.labels[real]},
        )

    def logits(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, T), (B,) -> (B, K); frozen blocks run without gradients, or not at all."""
        if self.depth == 0 or self.is_sharded:  # FSDP gathers a module's weights when the module itself is called
            return self.model(input_ids, lengths)
        if self._stored is None:
            with torch.no_grad():
                x = self.run_frozen(input_ids, lengths)
        else:
            rows = zip(input_ids.cpu().numpy(), lengths.tolist(), strict=True)
            n_rows = 1 if self.depth is None else input_ids.size(1)
            x = self._stored.batch([_key(row[:length]) for row, length in rows], n_rows).to(input_ids.device)
        x = x.to(self.model.head.weight.dtype)
        if self.depth is None:
            return self.model.head(x[:, 0])
        return self.model.finish(x, lengths, start=self.depth)

    def run_frozen(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """What the frozen part gives, in the type it is kept in: (B, T, C), or of a wholly frozen trunk (B, 1, C)."""
        if self.depth is None:
            x = self.model.pool(self.trunk.embed(input_ids), lengths).unsqueeze(1)
        else:
            x = self.model.run_lower(input_ids, lengths, self.depth)
        return x.to(self._frozen_dtype)

    # --- frozen blocks ---------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        if reason := self.why_not_stored():
            log.info("Frozen blocks: not stored: %s", reason)
        self._open_store()

    def on_test_start(self) -> None:
        self._open_store()

    def why_not_stored(self) -> str | None:
        """Why frozen blocks are computed again at every step; None if they are not."""
        config = self.trunk.config
        if self.depth == 0:
            return "the lowest block is trained"
        if not self.use_cache:
            return "task.frozen_cache=false"
        if config.embedding_dropout or config.attention_dropout or config.residual_dropout:
            return "with model.dropout above 0 they give something else every time"
        if self.is_sharded:
            return "their weights are sharded"
        return None

    def _open_store(self) -> None:
        """Compute what frozen blocks give for every sample, as far as no earlier run did."""
        if self._stored is not None:
            return
        if self.why_not_stored() is not None:
            return
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        samples = datamodule.all_samples()
        # The one pad that stands for a batch without texts, in a process that ran out of them before the others.
        samples.append(LabelledSample(-1, np.array([self.pad_id]), IGNORE_INDEX))

        def compute(indices: list[int]) -> Tensor:
            part = datamodule.collate([samples[index] for index in indices])
            ids, lengths = part.input_ids.to(self.device), part.lengths.to(self.device)
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                rows = self.run_frozen(ids, lengths)
            counts = self._rows(part.lengths.tolist())
            return torch.cat([row[:n] for row, n in zip(rows, counts, strict=True)]).cpu()

        store = FrozenCache(self._identity(), width=self.trunk.config.n_embd, dtype=self._frozen_dtype)
        training = self.model.training
        self.model.eval()
        try:
            store.ensure(
                [_key(sample.token_ids) for sample in samples],
                self._rows([len(sample.token_ids) for sample in samples]),
                compute,
                rows_per_batch=TOKENS_PER_BATCH if self.depth is not None else TOKENS_PER_BATCH // 8,
                description="frozen blocks",
            )
        except FrozenCacheError as error:
            log.warning("Frozen blocks: not stored: %s", error)
            return
        finally:
            self.model.train(training)
        give_back_freed_memory()
        self._stored = store

    def _identity(self) -> dict[str, Any]:
        frozen = ((name, p.detach()) for name, p in self.model.named_parameters() if not p.requires_grad)
        return {
            "task": self.task,
            "weights": weights_digest(frozen),
            "blocks": self.depth,
            "n_head": self.trunk.config.n_head,
            "pooling": self.model.pooling if self.depth is None or self.model.reads_pads else None,
            "causal": self.model.causal,
            "pad_to": self.pad_to if self.model.reads_pads else None,
            "precision": self.trainer.precision,
            "device": self.device.type,
        }

    def _rows(self, lengths: list[int]) -> list[int]:
        """How many rows the frozen part gives for sequences of these lengths."""
        if self.depth is None:
            return [1] * len(lengths)
        if self.model.reads_pads:
            assert self.pad_to is not None
            return [self.pad_to] * len(lengths)
        return lengths

    @property
    def _frozen_dtype(self) -> torch.dtype:
        return self.trunk.token_embedding.weight.dtype

    # --- a whole evaluation ----------------------------------------------------------------------------------------

    def metric_names(self) -> tuple[str, ...]:
        return ("loss", "accuracy", "accuracy_low", "accuracy_high", "precision", "recall", "f1", "auroc")

    def eval_metrics(self, stage: str, means: dict[str, float], outputs: dict[str, Tensor]) -> dict[str, float]:
        logits, labels = outputs["logits"], outputs["labels"]
        if stage == "val" and self.tune_threshold:
            self.model.threshold.fill_(best_threshold(logits.softmax(-1)[:, 1], labels))
        predicted = outputs["predicted"]
        if len(self.labels) == 2:  # the threshold may just have been chosen
            predicted = self.model.predict(logits.to(self.model.threshold.device)).cpu()
        self._seen[stage] = {"labels": labels, "predicted": predicted}
        if len(self.labels) == 2:
            self._seen[stage]["logits"] = logits
        low, high = wilson_interval(int((predicted == labels).sum()), len(labels))
        accuracy = (predicted == labels).double().mean().item()
        metrics = {**means, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
        metrics |= count_metrics(predicted, labels, len(self.labels))
        if len(self.labels) > MOST_SHOWN:
            columns = softmax_columns(logits)
            return metrics | {
                "auroc": auroc_of_many(
                    lambda block: self.rows_of_all_processes(columns(block)), labels, len(self.labels)
                )
            }
        return metrics | {"auroc": auroc(logits.softmax(-1), labels)}

    @property
    def outputs_kept_apart(self) -> frozenset[str]:
        """The logits of many classes: gathered a few classes at a time, where they are needed."""
        return frozenset({"logits"} if len(self.labels) > MOST_SHOWN else ())

    def results(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "labels": self.labels,
            "threshold": float(self.model.threshold) if len(self.labels) == 2 else None,
        }
        for stage, seen in self._seen.items():
            name, confusions = described_confusions(seen["predicted"], seen["labels"], self.labels)
            facts.setdefault(name, {})[stage] = confusions
        return facts

    def figures(self) -> dict[str, Figure]:
        drawn = {}
        for stage, seen in self._seen.items():
            if stage == "train_eval":
                continue
            if len(self.labels) > MOST_SHOWN:
                pairs = most_confused(seen["predicted"], seen["labels"], self.labels)
                drawn[f"{stage}_confused"] = confused_figure(pairs, stage)
                continue
            matrix = confusion(seen["predicted"], seen["labels"], len(self.labels))
            drawn[f"{stage}_confusion"] = confusion_figure(matrix, self.labels, stage)
            if len(self.labels) == 2:
                drawn[f"{stage}_roc"] = roc_figure(seen["logits"].softmax(-1)[:, 1], seen["labels"], stage)
        return drawn


def _key(token_ids: np.ndarray) -> bytes:
    """The name of a sequence in the store."""
    return hashlib.sha256(token_ids.astype(np.int64).tobytes()).digest()


def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The threshold on `scores` (N,) with most right answers; of equally good ones, the nearest to 0.5.

    Candidates are 0.5 and the middles between neighbouring scores.
    """
    different = scores.double().unique()
    candidates = torch.cat([torch.tensor([0.5], dtype=torch.float64), (different[1:] + different[:-1]) / 2])
    ordered, places = scores.double().sort()
    second = torch.cat([torch.zeros(1, dtype=torch.int64), labels[places].long().cumsum(0)])  # among the first n
    below = torch.searchsorted(ordered, candidates)  # said to be the first class
    right = below - second[below] + second[-1] - second[below]
    best = candidates[right == right.max()]
    return best[(best - 0.5).abs().argmin()].item()


def confusion_figure(matrix: Tensor, labels: Sequence[str], stage: str) -> Figure:
    """Counts of true against predicted classes."""
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
    """True against false positive rate over all thresholds."""
    from matplotlib.figure import Figure

    false_positive, true_positive, _ = measures.binary_roc(scores, labels)
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(false_positive, true_positive)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.grid(alpha=0.3)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=stage)
    return figure


def _number_of_blocks(setting: int | str) -> int:
    if isinstance(setting, bool) or not isinstance(setting, int):
        raise ValueError(f"task.trained_blocks={setting} must be a number of blocks (0: the head alone), auto or all")
    return setting


def _class_weights(setting: Sequence[float] | str | None, counts: Sequence[int]) -> Tensor | None:
    if setting is None:
        return None
    if setting == "balanced":
        return torch.tensor([sum(counts) / (len(counts) * count) for count in counts])
    weights = [setting] if isinstance(setting, (int, float, str)) else list(setting)
    numbers = [one for one in weights if isinstance(one, (int, float)) and not isinstance(one, bool)]
    if len(numbers) != len(counts) or len(weights) != len(counts) or not min(numbers) > 0:
        raise ValueError(
            f"task.class_weights={setting} must be balanced or {len(counts)} positive numbers, one for each class"
        )
    return torch.tensor([float(weight) for weight in numbers])
