"""Metrics over classes against scikit-learn and torchmetrics, at few classes and at many; and what they cost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm_lightning.metrics.class_figures import confused_figure
from llm_lightning.metrics.classes import (
    MOST_SHOWN,
    ConfusedPair,
    auroc,
    auroc_of_many,
    confusion,
    count_metrics,
    described_confusions,
    most_confused,
    softmax_columns,
)

PEAK = Path(__file__).with_name("peak_of_many_classes.py")


def drawn(n: int, classes: int, *, absent: bool, ties: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and labels; `absent`: some classes have no text, others are never predicted, some neither."""
    draw = torch.Generator().manual_seed(classes * 1000 + n)
    labels = torch.randint(classes, (n,), generator=draw)
    if not absent:
        labels[: min(n, classes)] = torch.arange(classes)[:n]
    logits = torch.randn(n, classes, generator=draw) + 2 * torch.nn.functional.one_hot(labels, classes)
    if absent and classes > 2:
        labels[labels % 3 == 1] = 0
        logits[:, ::4] -= 50
    return (logits.round() if ties else logits), labels


@pytest.mark.slow
def test_counts_are_those_of_scikit_learn_with_classes_that_are_missing_too() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="needs the dev extra: scikit-learn")
    failures = []
    for n, classes in ((40, 2), (300, 3), (300, 50), (500, 100), (500, 101), (2000, 1000), (1000, 5000)):
        for absent in (False, True):
            logits, labels = drawn(n, classes, absent=absent)
            predicted = logits.argmax(-1)
            how: dict[str, Any] = {"average": "binary" if classes == 2 else "macro", "zero_division": 0}
            wanted = dict(
                zip(
                    ("precision", "recall", "f1"),
                    sklearn.precision_recall_fscore_support(labels, predicted, **how),
                    strict=False,
                )
            )
            found = count_metrics(predicted, labels, classes)
            if found != pytest.approx(wanted, abs=1e-6):
                failures.append((n, classes, absent, found, wanted))
            matrix = sklearn.confusion_matrix(labels, predicted, labels=range(classes))
            if classes <= MOST_SHOWN and confusion(predicted, labels, classes).tolist() != matrix.tolist():
                failures.append((n, classes, absent, "confusion"))
    assert not failures


def columns_of(scores: Tensor, block: Tensor) -> Tensor:
    return scores[:, block]


@pytest.mark.slow
def test_the_area_under_the_curve_is_that_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="needs the dev extra: scikit-learn")
    failures = []
    for n, classes in ((40, 2), (300, 3), (100, 20), (150, 101)):
        for absent in (False, True):
            for ties in (False, True):
                logits, labels = drawn(n, classes, absent=absent, ties=ties)
                scores = logits.softmax(-1)
                columns = [1] if classes == 2 else [k for k in range(classes) if 0 < int((labels == k).sum()) < n]
                wanted = np.mean([sklearn.roc_auc_score(labels == k, scores[:, k]) for k in columns])
                ways = {"whole": auroc(scores, labels)} if classes <= MOST_SHOWN else {}
                if classes > 2:
                    ways["given"] = auroc_of_many(partial(columns_of, scores), labels, classes)
                if classes > 2 and not ties:  # which rounding breaks
                    ways["blocks"] = auroc_of_many(softmax_columns(logits), labels, classes)
                for way, found in ways.items():
                    if found != pytest.approx(wanted, abs=1e-6):
                        failures.append((n, classes, absent, ties, way, found, wanted))
    assert not failures


@pytest.mark.parametrize("deterministic", [False, True])
def test_with_few_classes_all_numbers_are_those_of_torchmetrics_to_the_bit(deterministic: bool) -> None:
    from torchmetrics.functional import classification as measures

    torch.use_deterministic_algorithms(deterministic)
    try:
        for n, classes in ((40, 2), (200, 3), (250, 20), (300, 100)):
            logits, labels = drawn(n, classes, absent=False)
            predicted, scores = logits.argmax(-1), logits.softmax(-1)
            options: dict[str, Any] = {"task": "multiclass", "num_classes": classes, "average": "macro"}
            options = {"task": "binary"} if classes == 2 else options
            found = count_metrics(predicted, labels, classes)
            assert found["precision"] == float(measures.precision(predicted, labels, **options))
            assert found["recall"] == float(measures.recall(predicted, labels, **options))
            assert found["f1"] == float(measures.f1_score(predicted, labels, **options))
            area = measures.auroc(scores[:, 1] if classes == 2 else scores, labels, **options)
            assert auroc(scores, labels) == float(area)  # type: ignore[arg-type]
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_divided_by_nothing() -> None:
    same, other = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    assert count_metrics(other, same, 3) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert count_metrics(same, same, 3) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    scores = torch.full((3, 200), 1 / 200)
    assert auroc(scores[:, :50], same) == auroc_of_many(softmax_columns(scores), same, 200) == 0.0


def test_the_most_confused_pairs_by_hand() -> None:
    names = [f"class {index}" for index in range(150)]
    true = torch.tensor([5] * 6 + [7] * 3 + [149] * 2)
    predicted = torch.tensor([5, 5, 9, 9, 9, 1, 8, 8, 7, 0, 0])
    assert most_confused(predicted, true, names) == [
        ConfusedPair("class 5", "class 9", 3, 6),
        ConfusedPair("class 7", "class 8", 2, 3),
        ConfusedPair("class 149", "class 0", 2, 2),
        ConfusedPair("class 5", "class 1", 1, 6),
    ]
    assert most_confused(predicted, true, names, most=1) == [ConfusedPair("class 5", "class 9", 3, 6)]
    assert most_confused(true, true, names) == []
    draw = torch.Generator().manual_seed(0)
    true, predicted = torch.randint(150, (2, 4000), generator=draw)
    counts = Counter((a, b) for a, b in zip(true.tolist(), predicted.tolist(), strict=True) if a != b)
    wanted = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
    found = most_confused(predicted, true, names)
    assert [(one.true, one.predicted, one.texts) for one in found] == [
        (names[a], names[b], count) for (a, b), count in wanted
    ]


def test_a_matrix_up_to_a_hundred_classes_and_pairs_beyond() -> None:
    for classes, name in ((2, "confusion"), (MOST_SHOWN, "confusion"), (MOST_SHOWN + 1, "most_confused")):
        labels = torch.arange(classes)
        found, values = described_confusions(labels.roll(1), labels, [str(index) for index in range(classes)])
        assert found == name
        assert json.loads(json.dumps(values)) == values
        assert len(values) == (classes if name == "confusion" else 20)


def test_the_figure_of_pairs_draws_any_name(tmp_path: Path) -> None:
    for pairs in ([], [ConfusedPair("$x_{", "a$b", 3, 4), ConfusedPair("long " * 40, "\u00e9", 1, 1)]):
        confused_figure(pairs, "test").savefig(tmp_path / "figure.png")


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, Tensor):
                self.size = max(self.size, made.numel())
        return result


def test_nothing_is_as_large_as_the_pairs_of_many_classes() -> None:
    n, classes = 60, 3000
    logits, labels = drawn(n, classes, absent=True)
    predicted, names = logits.argmax(-1), [str(index) for index in range(classes)]
    torch.use_deterministic_algorithms(True)
    try:
        with Largest() as largest:
            count_metrics(predicted, labels, classes)
            described_confusions(predicted, labels, names)
            auroc_of_many(softmax_columns(logits), labels, classes)
            with torch.inference_mode():
                auroc_of_many(softmax_columns(logits), labels, classes)
    finally:
        torch.use_deterministic_algorithms(False)
    assert largest.size <= n * classes


def measured(*arguments: str) -> dict[str, float]:
    """Megabytes, as a process of its own finds them."""
    done = subprocess.run([sys.executable, str(PEAK), *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("where", ["training", "evaluate"])
def test_five_thousand_texts_of_ten_thousand_classes_take_little_beside_their_logits(where: str) -> None:
    found = measured("5000", "10000", where)
    assert found["logits"] == 200
    assert found["above_logits"] < 200
