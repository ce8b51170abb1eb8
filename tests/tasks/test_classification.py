"""The classification task: what is trained, what is stored, what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.batches import ClassificationBatch, LabelledSample, collate_classification
from llm_lightning.metrics.class_report import best_threshold
from llm_lightning.metrics.intervals import wilson_interval
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.schedules import WarmupCosineConfig
from llm_lightning.tasks.classification import ClassificationModule
from llm_lightning.tokenizers.build import build_tokenizer

CONFIG = GPTConfig(vocab_size=257, context_length=16, n_layer=3, n_head=2, n_embd=16)


class Texts(Dataset):
    """Random sequences; those of class 1 hold a certain token."""

    def __init__(self, n: int, seed: int = 0, classes: int = 2) -> None:
        draw = np.random.default_rng(seed)
        self.rows = []
        for index in range(n):
            ids, label = draw.integers(0, 250, draw.integers(2, 17)), index % classes
            ids[draw.integers(len(ids))] = 250 + label
            self.rows.append(LabelledSample(index, ids, label))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LabelledSample:
        return self.rows[index]


class TextsDataModule(BaseDataModule):
    def __init__(self, *, classes: int = 2, pad_to: int | None = None, **options: Any) -> None:
        super().__init__(**{"batch_size": 4, **options})
        self.tokenizer = build_tokenizer("byte")
        self.labels = ["ham", "spam", "other"][:classes]
        self.train_samples = Texts(30, classes=classes)
        self.eval_samples = {"val": Texts(13, seed=1, classes=classes)}
        self.test_samples = {"test": Texts(21, seed=2, classes=classes)}
        self.data_digest, self.pad_to, self.pad_id = "texts", pad_to, 256

    def build(self) -> None: ...

    def collate(self, samples: Any) -> ClassificationBatch:
        return collate_classification(samples, pad_id=self.pad_id, pad_to=self.pad_to)

    def preview(self, n: int) -> str:
        return ""

    def describe(self) -> str:
        return "random"


def tiny(
    data: TextsDataModule, *, lr: float = 1e-2, lora: LoRAConfig | None = None, seed: int = 0, **options: Any
) -> Any:
    torch.manual_seed(seed)
    return ClassificationModule(
        model=GPT(CONFIG),
        tokenizer=data.tokenizer,
        optimizer=AdamWConfig(lr=lr),
        scheduler=WarmupCosineConfig(warmup=2),
        lora=lora,
        **ClassificationModule.options_from(data),
        **options,
    )


def losses(folder: Path, make_trainer: Callable[..., L.Trainer], **options: Any) -> tuple[list[float], Any]:
    """The training losses of three epochs, and the module."""
    data = TextsDataModule(pad_to=options.pop("pad_to", None))
    module = tiny(data, **options)
    seen: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module._step_means["loss"])

    make_trainer(folder, [Watch()], max_epochs=3).fit(module, datamodule=data)
    return seen, module


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_stored_and_computed_blocks_give_the_same_losses(
    tmp_path: Path, make_trainer: Any, blocks: int, causal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"trained_blocks": blocks, "causal": causal}
    computed, _ = losses(tmp_path, make_trainer, frozen_cache=False, **options)
    stored, module = losses(tmp_path, make_trainer, **options)
    assert module.frozen_blocks.store is not None
    assert len(stored) == 24
    assert stored == pytest.approx(computed, abs=1e-5)


@pytest.mark.slow
def test_other_weights_have_a_store_of_their_own(tmp_path: Path, make_trainer: Any) -> None:
    losses(tmp_path, make_trainer, trained_blocks=1)
    computed, _ = losses(tmp_path, make_trainer, trained_blocks=1, seed=1, frozen_cache=False)
    stored, _ = losses(tmp_path, make_trainer, trained_blocks=1, seed=1)
    assert stored[0] == pytest.approx(computed[0], abs=1e-5)  # later ones drift apart by rounding


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["last_position", "mean_position"])
def test_padding_that_is_read_is_stored_too(tmp_path: Path, make_trainer: Any, pooling: str) -> None:
    options = {"trained_blocks": 1, "pooling": pooling, "pad_to": 16}
    computed, _ = losses(tmp_path, make_trainer, frozen_cache=False, **options)
    stored, module = losses(tmp_path, make_trainer, **options)
    assert module.frozen_blocks.store is not None
    assert stored == pytest.approx(computed, abs=1e-5)


@pytest.mark.slow
def test_a_second_run_computes_no_frozen_block(
    tmp_path: Path, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = losses(tmp_path, make_trainer, trained_blocks=1)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("a frozen block was computed again")

    monkeypatch.setattr(Classifier, "run_lower", refuse)
    again, _ = losses(tmp_path, make_trainer, trained_blocks=1)
    assert again == first
    with pytest.raises(AssertionError, match="computed again"):
        losses(tmp_path, make_trainer, trained_blocks=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"trained_blocks": "all"}, "the lowest block is being trained"),
        ({"trained_blocks": 1, "frozen_cache": False}, "task.frozen_cache=false"),
        ({"trained_blocks": 1, "lora": LoRAConfig()}, "the lowest block is being trained"),
    ],
)
def test_why_nothing_is_stored_is_said(
    tmp_path: Path, make_trainer: Any, options: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    losses(tmp_path, make_trainer, **options)
    assert f"Frozen-block cache off: {reason}" in caplog.text


def test_only_what_was_chosen_is_trained(tmp_path: Path, make_trainer: Any) -> None:
    before = {name: p.clone() for name, p in tiny(TextsDataModule(), trained_blocks=1).named_parameters()}
    _, module = losses(tmp_path, make_trainer, trained_blocks=1)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "blocks.2." in name or "final_norm" in name or "head." in name}


@pytest.mark.slow
def test_metrics_against_arithmetic_by_hand(tmp_path: Path, make_trainer: Any) -> None:
    data = TextsDataModule()
    module = tiny(data)
    trainer = make_trainer(tmp_path, [], max_epochs=2)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    samples = data.test_samples["test"]
    batch = data.collate([samples[index] for index in range(len(samples))])
    with torch.no_grad():
        probabilities = module.frozen_blocks.logits(batch.input_ids, batch.lengths).softmax(-1)
    said, true = probabilities[:, 1] >= 0.5, batch.labels == 1
    hits, n = int((said & true).sum()), len(samples)
    assert metrics["test/accuracy"] == pytest.approx(float((said == true).float().mean()))
    assert metrics["test/precision"] == pytest.approx(hits / max(1, int(said.sum())))
    assert metrics["test/recall"] == pytest.approx(hits / int(true.sum()))
    assert metrics["test/loss"] == pytest.approx(-probabilities[range(n), batch.labels].log().mean().item(), rel=1e-5)
    pairs = [(p, q) for p in probabilities[true, 1].tolist() for q in probabilities[~true, 1].tolist()]
    area = sum(1.0 if p > q else 0.5 if p == q else 0.0 for p, q in pairs) / len(pairs)
    assert metrics["test/auroc"] == pytest.approx(area, abs=1e-6)
    assert module.results()["confusion"]["test"][1][1] == hits
    assert set(module.figures()) == {"val_confusion", "val_roc", "test_confusion", "test_roc"}


@pytest.mark.slow
def test_more_than_two_classes(tmp_path: Path, make_trainer: Any) -> None:
    data = TextsDataModule(classes=3)
    module = tiny(data, class_weights="balanced")
    trainer = make_trainer(tmp_path, [], max_epochs=8)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0 <= metrics["test/f1"] <= 1
    assert np.array(module.results()["confusion"]["test"]).sum() == 21
    assert module.results()["threshold"] is None


def test_class_weights_weigh_the_loss() -> None:
    data = TextsDataModule()
    batch = data.collate([data.train_samples[index] for index in range(6)])
    plain, weighted = tiny(data), tiny(data, class_weights=[1.0, 3.0])
    with torch.no_grad():
        logits = plain.frozen_blocks.logits(batch.input_ids, batch.lengths)
        each = -logits.log_softmax(-1)[range(6), batch.labels]
        factor = torch.where(batch.labels == 1, 3.0, 1.0)
        assert plain.step_output(batch).loss_sum.item() == pytest.approx(each.sum().item(), rel=1e-5)
        assert weighted.step_output(batch).loss_sum.item() == pytest.approx((each * factor).sum().item(), rel=1e-5)


def test_wilson_interval_is_that_of_scipy_and_the_books_287_of_300() -> None:
    # scipy.stats.binomtest(287, 300).proportion_ci(method="wilson"), and a textbook case: 8 of 10
    assert wilson_interval(287, 300) == pytest.approx((0.927283, 0.974504), abs=1e-6)
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_the_best_threshold_by_trying_all() -> None:
    draw = torch.Generator().manual_seed(5)
    for _ in range(20):
        labels = torch.randint(2, (25,), generator=draw)
        scores = (torch.rand(25, generator=draw) + 0.3 * labels).clamp(max=1) * 0.6
        found = best_threshold(scores, labels)
        right = int(((scores >= found) == labels.bool()).sum())
        thresholds = torch.linspace(-0.01, 1.01, 5001)[5:-5, None]
        assert right >= int(((scores >= thresholds) == labels.bool()).sum(-1).max())


def test_the_threshold_is_chosen_on_the_main_validation_data_alone(tmp_path: Path, make_trainer: Any) -> None:
    data = TextsDataModule()
    data.eval_samples["val/hard"] = Texts(17, seed=3)
    module = tiny(data, tune_threshold=True, lr=1e-3)
    trainer = make_trainer(tmp_path, [], max_epochs=1)
    trainer.fit(module, datamodule=data)
    chosen = module.model.threshold.item()
    trainer.test(module, datamodule=data, verbose=False)
    assert module.model.threshold.item() == chosen
    seen, further = (module.report.evaluated[stage] for stage in ("val", "val/hard"))
    assert chosen != pytest.approx(best_threshold(further["logits"].softmax(-1)[:, 1], further["labels"]))
    assert further["predicted"].tolist() == (further["logits"].softmax(-1)[:, 1] >= chosen).long().tolist()
    assert chosen == pytest.approx(best_threshold(seen["logits"].softmax(-1)[:, 1], seen["labels"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "last_position"}, "reads the padding.*set data.pad_to"),
        ({"trained_blocks": 7}, "trained_blocks=7 must be between 0 and model.n_layer=3"),
        ({"trained_blocks": "some"}, "trained_blocks=some must be a number"),
        ({"class_weights": [1.0]}, "2 positive numbers"),
        ({"class_weights": "even"}, "must be balanced"),
    ],
)
def test_settings_that_cannot_be(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(TextsDataModule(), **options)


def test_a_threshold_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="needs two classes, and there are 3"):
        tiny(TextsDataModule(classes=3), tune_threshold=True)
    assert math.isclose(tiny(TextsDataModule()).model.threshold.item(), 0.5)
