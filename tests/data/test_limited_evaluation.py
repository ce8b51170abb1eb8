"""Limited evaluation measures a fixed sample spread over the split, on any number of processes, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ragged import RaggedDataModule
from tiny_run import SETTINGS, finish, fit_here, start

from llm_lightning.data.order import limited, spread_sample


def test_a_sample_has_one_of_each_stretch_and_is_always_the_same() -> None:
    failures = []
    for size in (1, 2, 7, 61, 92, 1000):
        for n in range(1, size + 1, max(1, size // 13)):
            found = spread_sample(size, n)
            stretch = found * n // size  # may be one too low at an edge
            right = len(np.unique(found)) == n and found[-1] < size and np.array_equal(found, np.sort(found))
            if not right or (np.abs(stretch - np.arange(n)) > 1).any() or (found != spread_sample(size, n)).any():
                failures.append((size, n, found))
    assert failures == []
    alternating = spread_sample(61, 16) % 2  # an even distance of 4 would meet one kind only
    assert 4 <= alternating.sum() <= 12
    assert [limited(10, limit) for limit in (None, 1.0, 0.25, 3, 30, 0)] == [10, 10, 2, 3, 10, 0]


class ByLength(RaggedDataModule):
    def order_of(self, samples: Any, *, is_training: bool) -> Any:
        lengths = [len(samples[index].token_ids) for index in range(len(samples))]
        return lambda epoch: np.argsort(lengths, kind="stable")


def read(limit: Any, rank: int, world_size: int, batch_size: int) -> list[tuple[int, ...]]:
    """The samples of each batch that a process evaluates of 92."""
    data = ByLength(n_val=92, batch_size=batch_size)
    trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        limit_val_batches=limit,
        limit_test_batches=1.0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.trainer = trainer  # type: ignore[assignment]
    loader = data.val_dataloader()[0]
    ids = [batch.sample_ids for batch in loader]
    assert sorted(one for batch in ids for one in batch) == list(range(92)) or world_size > 1
    return ids[: limited(len(loader), limit)]


def test_the_first_batches_are_the_sample_sorted_by_length() -> None:
    lengths = [len(row) for row in RaggedDataModule(n_val=92, batch_size=8).eval_samples["val"].rows]  # type: ignore[attr-defined]
    for limit, n in ((2, 16), (0.3, 24), (1, 8)):
        batches = read(limit, 0, 1, 8)
        chosen = [one for batch in batches for one in batch]
        assert sorted(chosen) == spread_sample(92, n).tolist()
        assert [lengths[one] for one in chosen] == sorted(lengths[one] for one in chosen)
        parts = [read(limit, rank, 2, 4) for rank in (0, 1)]
        assert [one + other for one, other in zip(*parts, strict=True)] == batches
    assert np.mean([lengths[one] for one in spread_sample(92, 16)]) == pytest.approx(np.mean(lengths), abs=1.5)
    whole = [one for batch in read(1.0, 0, 1, 8) for one in batch]
    assert whole == np.argsort(lengths, kind="stable").tolist() == [one for batch in read(12, 0, 1, 8) for one in batch]


def test_the_print_says_that_it_is_a_sample(tmp_path: Path) -> None:
    settings = [word for word in SETTINGS if "samples" not in word]
    limits = ["trainer.limit_val_batches=1", "+trainer.limit_test_batches=2", "trainer.max_steps=2"]
    words = [*settings, "task=classification", *limits, "callbacks.plots=null", f"hydra.run.dir={tmp_path / 'run'}"]
    outcome = fit_here(words)
    assert outcome.code == 0, outcome.err
    assert "Limited evaluation: a fixed sample, 8 of 46 val texts\n" in outcome.out
    closing = [line for line in outcome.out.splitlines() if line.startswith(("Best val/loss", "Test accuracy"))]
    assert closing[0].endswith(" (8 of 46 val texts, a fixed sample).")
    assert closing[1].endswith(" (16 of 92 test texts, a fixed sample).")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert np.sum(summary["confusion"]["test"]) == 16
    assert "\n".join(closing) in fit_here(words).out  # finished, and said again


@pytest.mark.slow
def test_two_processes_measure_the_sample_that_one_does(tmp_path: Path) -> None:
    settings = [word for word in SETTINGS if "samples" not in word and not word.startswith("accelerator=")]
    limits = ["trainer.limit_val_batches=2", "+trainer.limit_test_batches=0.25", "trainer.max_steps=1"]
    words = [*settings, "task=classification", *limits, "callbacks.plots=null", "data.eval_batches=0"]
    two = ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=4"]
    ways = {"one": ["accelerator=cpu", "data.batch_size=8"], "two": two}
    found = {}
    for way, more in ways.items():
        outcome = finish(start([*words, *more, f"hydra.run.dir={tmp_path / way}"], tmp_path))
        assert outcome.code == 0, outcome.err
        found[way] = json.loads((tmp_path / way / "summary.json").read_text())
    assert found["one"]["sampled"] == found["two"]["sampled"]
    assert found["one"]["confusion"] == found["two"]["confusion"]
    for name in ("val/loss", "test/loss", "test/accuracy", "test/auroc"):
        assert found["one"]["metrics"][name] == pytest.approx(found["two"]["metrics"][name], rel=1e-5), name
