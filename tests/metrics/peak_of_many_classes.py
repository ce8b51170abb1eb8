"""Run by test_class_metrics.py in a process of its own: evaluate a classifier of many classes, print its peak memory.

Arguments: texts, classes, and `training` (a test through the Trainer, with its figures) or `evaluate` (the verb's
function). Prints one JSON object, in megabytes: `logits`, and `above_logits`, what the evaluation took beside them and
what was there before it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ragged import tiny_trainer

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.batches import LabelledSample, collate_classification
from llm_lightning.inference.evaluate import evaluate_labelled
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.schedules import WarmupCosineConfig
from llm_lightning.tasks.classification import ClassificationModule
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights.load import LoadedModel

CONFIG = GPTConfig(vocab_size=257, context_length=16, n_layer=1, n_head=2, n_embd=16)


class Texts(Dataset):
    def __init__(self, n: int, classes: int) -> None:
        draw = np.random.default_rng(0)
        self.rows = [LabelledSample(i, draw.integers(0, 250, 8), int(draw.integers(classes))) for i in range(n)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LabelledSample:
        return self.rows[index]


class TextsDataModule(BaseDataModule):
    def __init__(self, n: int, classes: int) -> None:
        super().__init__(batch_size=8)
        self.tokenizer, self.labels = build_tokenizer("byte"), [f"class {index}" for index in range(classes)]
        self.train_samples = Texts(32, classes)
        self.eval_samples = {"val": Texts(8, classes)}
        self.test_samples = {"test": Texts(n, classes)}
        self.data_digest, self.pad_to, self.pad_id = "texts", None, 256

    def build(self) -> None: ...

    def collate(self, samples: Any) -> Any:
        return collate_classification(samples, pad_id=self.pad_id)

    def preview(self, n: int) -> str:
        return ""

    def describe(self) -> str:
        return "random"


def in_use(key: str) -> float:
    """VmRSS or VmHWM, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def training(n: int, classes: int) -> float:
    """A test as a run does it, with deterministic algorithms and after training."""
    data = TextsDataModule(n, classes)
    torch.manual_seed(0)
    module = ClassificationModule(
        model=GPT(CONFIG),
        tokenizer=data.tokenizer,
        optimizer=AdamWConfig(lr=1e-3),
        scheduler=WarmupCosineConfig(warmup=2),
        **ClassificationModule.options_from(data),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny_trainer(Path(folder), [], max_epochs=1, deterministic=True)
        trainer.fit(module, datamodule=data)
        module.figures()  # loads what draws
        before = in_use("VmRSS")
        trainer.test(module, datamodule=data, verbose=False)
        figures = module.figures()
    assert set(figures) == {"val_confused", "test_confused"}
    facts = module.results()
    assert "confusion" not in facts
    assert len(facts["most_confused"]["test"]) == 20
    assert 0.4 < float(trainer.callback_metrics["test/auroc"]) < 0.6
    return before


def evaluate(n: int, classes: int) -> float:
    """What `llm-lightning evaluate` calls."""
    torch.manual_seed(0)
    header = {"classifier": {"labels": [f"class {index}" for index in range(classes)], "pad_id": 256, "pad_to": None}}
    loaded = LoadedModel(Classifier(GPT(CONFIG), classes).eval(), build_tokenizer("byte"), header)
    draw = np.random.default_rng(0)
    records = [(f"text {index}", f"class {draw.integers(classes)}") for index in range(n)]
    evaluate_labelled(loaded, records[:10])  # loads what measures
    before = in_use("VmRSS")
    found = evaluate_labelled(loaded, records)
    assert "confusion" not in found
    assert len(found["most_confused"]) == 20
    return before


if __name__ == "__main__":
    os.environ.setdefault("LLM_LIGHTNING_CACHE", tempfile.mkdtemp())
    torch.set_num_threads(1)
    texts, classes = int(sys.argv[1]), int(sys.argv[2])
    before = {"training": training, "evaluate": evaluate}[sys.argv[3]](texts, classes)
    logits = texts * classes * 4 / 1e6
    print(json.dumps({"logits": logits, "before": before, "above_logits": in_use("VmHWM") - before - logits}))
