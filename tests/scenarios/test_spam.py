"""The real messages, a small model from scratch, both splits, and a bag-of-words classifier as the yardstick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import train_here

from llm_lightning.data.classification import ClassificationDataModule
from llm_lightning.metrics.intervals import wilson_interval
from llm_lightning.tokenizers.build import build_tokenizer

RECORDS = {"book": 5572, "grouped": 5574}


def bag_of_words(data: ClassificationDataModule) -> float:
    """Test accuracy of a logistic regression on word counts."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels = zip(*data.split_of("train"), strict=True)
    counter = CountVectorizer()
    model = LogisticRegression(max_iter=1000).fit(counter.fit_transform(texts), labels)
    texts, labels = zip(*data.split_of("test"), strict=True)
    return float(model.score(counter.transform(texts), labels))


@pytest.mark.slow
@pytest.mark.parametrize("split", RECORDS)
def test_nano_from_scratch(split: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn", reason="needs the dev extra: scikit-learn")
    file = data_dir / "SMSSpamCollection.tsv"
    options: dict[str, Any] = {"name": "sms_spam", "path": str(file), "split": split}
    folder = tmp_path / "run"
    settings = [f"data.{key}={value}" for key, value in options.items()]
    outcome = train_here(
        ["task=classification", *settings, "trainer.enable_progress_bar=false", f"hydra.run.dir={folder}"]
    )
    assert outcome.code == 0, outcome.err
    summary = json.loads((folder / "summary.json").read_text())
    metrics, leak = summary["metrics"], summary["data"]["leaks"]["test"]
    data = ClassificationDataModule(tokenizer=build_tokenizer("byte"), context_length=128, batch_size=8, **options)
    data.build()
    yardstick, n = bag_of_words(data), len(data.split_of("test"))
    low, high = wilson_interval(round(yardstick * n), n)
    with capsys.disabled():
        interval = f"{metrics['test/accuracy_low']:.4f} to {metrics['test/accuracy_high']:.4f}"
        print(
            f"\n{split}: {summary['data']['records']} records, {leak['exact']} of {n} test texts in training; accuracy "
            f"{metrics['test/accuracy']:.4f} ({interval}), bag of words {yardstick:.4f} ({low:.4f} to {high:.4f})"
        )
    assert summary["data"]["records"] == RECORDS[split]
    assert (leak["exact"] == 0) == (split == "grouped")
    assert metrics["test/accuracy"] > 0.9
    assert metrics["test/accuracy_high"] > low, "no worse than the yardstick by more than chance"
