"""Runs grouped over seeds: means and intervals against SciPy, what is ranked, and what is compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_sweeps import make_job
from scipy import stats

from llm_lightning.experiments.report.commands import that_repeat
from llm_lightning.experiments.report.entries import read_entries
from llm_lightning.experiments.report.plots import pictures_of
from llm_lightning.experiments.report.study import Study, studies_of
from llm_lightning.experiments.report.tables import NONE, best_line, comparisons_table, groups_table

LOSSES = {0.1: (1.5, 1.52, 1.49), 0.01: (1.2, 1.25, 1.21), 0.001: (1.4, 1.38, 1.45)}


def studied(*folders: Path, metric: str | None = None) -> list[Study]:
    return studies_of([entry for folder in folders for entry in read_entries(folder, folder.name)], metric)


def make(folder: Path, losses: dict[float, tuple[Any, ...]], **changes: Any) -> Path:
    """A job for each learning rate and seed: its loss, or its status."""
    for rate, values in losses.items():
        for seed, value in enumerate(values, start=1):
            status, loss = (value, 9.0) if isinstance(value, str) else ("finished", value)
            make_job(folder / f"lr_{rate:g}-seed_{seed}", status, loss, optimizer__lr=rate, seed=seed, **changes)
    return folder


def test_every_mean_and_interval_is_scipys(tmp_path: Path) -> None:
    (study,) = studied(make(tmp_path, LOSSES))
    assert [group.name for group in study.groups] == ["lr 0.01", "lr 0.001", "lr 0.1"]
    for group in study.groups:
        values = LOSSES[group.settings["optimizer.lr"]]
        for metric, one in (("val/loss", values), ("test/loss", [value + 0.05 for value in values])):
            estimate = group.estimate(metric)
            interval = stats.t.interval(0.95, len(one) - 1, loc=sum(one) / len(one), scale=stats.sem(one))
            assert (estimate.low, estimate.high) == pytest.approx(interval, rel=1e-9)
            assert (estimate.mean, estimate.n) == (pytest.approx(sum(one) / len(one)), 3)
    assert "val/loss 1.2200 (1.1543 to 1.2857, n = 3), test/loss 1.2700 (1.2043 to 1.3357, n = 3)" in best_line(study)


def test_the_best_is_compared_with_every_other_setting(tmp_path: Path) -> None:
    (study,) = studied(make(tmp_path, LOSSES))
    assert study.best is not None
    assert [(one.a, one.b) for one in study.comparisons] == [("lr 0.01", "lr 0.001"), ("lr 0.01", "lr 0.1")]
    raw = sorted(stats.ttest_rel(LOSSES[a], LOSSES[b]).pvalue for a, b in ((0.01, 0.001), (0.01, 0.1), (0.001, 0.1)))
    corrected = [min(1.0, (3 - rank) * p) for rank, p in enumerate(raw)]
    for one, rate in zip(study.comparisons, (0.001, 0.1), strict=True):
        difference = [b - a for a, b in zip(LOSSES[0.01], LOSSES[rate], strict=True)]
        assert one.difference == pytest.approx(sum(difference) / 3)
        low, high = stats.t.interval(0.95, 2, loc=sum(difference) / 3, scale=stats.sem(difference))
        assert (one.low, one.high) == (pytest.approx(low), pytest.approx(high))
        assert any(one.p == pytest.approx(p) for p in corrected) or one.p == max(corrected)
        assert one.detectable > 0
    assert {cell for row in comparisons_table(study).rows for cell in row} >= {"lr 0.1", "lr 0.001"}  # type: ignore[union-attr]


@pytest.mark.parametrize("lost", ["failed", "died", "waiting", "stopped", "running", "unreadable"])
def test_a_setting_that_lost_a_seed_is_marked_and_never_the_best(tmp_path: Path, lost: str) -> None:
    (study,) = studied(make(tmp_path, {0.1: (1.5, 1.6, 1.4), 0.01: (0.2, 0.3, lost)}))
    assert [group.name for group in study.groups] == ["lr 0.1", "lr 0.01"]
    assert study.best is study.groups[0]
    assert [row[-1] for row in groups_table(study).rows] == [
        "the only one ranked",
        f"lacks 1 seed (1 {lost}): not ranked",
    ]
    assert best_line(study).startswith("the only setting ranked (1 other not ranked): lr 0.1; val/loss 1.5")
    assert study.comparisons[0].n == 2


def test_a_setting_with_fewer_seeds_or_without_a_finite_value_is_not_ranked(tmp_path: Path) -> None:
    (study,) = studied(make(tmp_path, {0.1: (1.5, 1.6), 0.01: (0.2,), 1.0: (0.1, math.nan)}))
    remarks = {group.name: row[-1] for group, row in zip(study.groups, groups_table(study).rows, strict=True)}
    assert remarks == {
        "lr 0.1": "the only one ranked",
        "lr 0.01": "only 1 of 2 seeds: not ranked",
        "lr 1": "lacks 1 seed (1 without a value): not ranked",
    }


def test_nothing_is_judged_by_one_seed_or_without_spread(tmp_path: Path) -> None:
    (single,) = studied(make(tmp_path / "single", {0.1: (1.5,), 0.01: (1.4,)}))
    assert single.comparisons[0].reason == "one common seed"
    assert comparisons_table(single).rows[0][1] == "not judged: one common seed"  # type: ignore[union-attr]
    assert groups_table(single).rows[0][3] == NONE
    (equal,) = studied(make(tmp_path / "equal", {0.1: (1.5, 1.5), 0.01: (1.5, 1.5)}))
    assert "no spread" in str(equal.comparisons[0].reason)
    assert equal.groups[0].estimate("val/loss") == (1.5, 1.5, 1.5, 2)


def test_no_setting_is_the_best_before_one_has_all_its_seeds(tmp_path: Path) -> None:
    (study,) = studied(make(tmp_path, {0.1: (1.5, "waiting"), 0.01: ("running", "waiting")}))
    assert study.best is None
    assert comparisons_table(study) is None
    assert best_line(study) == "val/loss: no setting can be ranked yet"


def test_settings_that_follow_another_one_or_the_seed_and_displays_do_not_count(tmp_path: Path) -> None:
    for index, (rate, seed) in enumerate([(0.1, 1), (0.1, 2), (0.01, 1), (0.01, 2)]):
        folder, extra = tmp_path / str(index), {"data__batch_size": seed, "callbacks__plots": index}
        make_job(folder, "finished", rate, optimizer__lr=rate, scheduler__min_lr=rate / 10, seed=seed, **extra)
        file = folder / "job.json"
        job = json.loads(file.read_text())
        file.write_text(json.dumps(job | {"swept": ["optimizer.lr", "seed"]}))
    (study,) = studied(tmp_path)
    assert study.keys == ["optimizer.lr"]


def test_a_setting_that_some_runs_do_not_have_tells_them_apart(tmp_path: Path) -> None:
    """An empty group, null instead of a group, an argument behind a plus; but not a key that another class has."""
    stopping = {"early_stopping": {"_target_": "a.EarlyStopping", "patience": 3}}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "lora": {"lora": {"_target_": "llm_lightning.models.lora.LoRAConfig", "rank": 8}},
        "stopping": {"callbacks": stopping},
        "added": {"optimizer__alpha": 0.9},
    }
    for index, (name, changes) in enumerate(variants.items()):
        for seed in (1, 2):
            made = {"callbacks": {"early_stopping": None}} | changes | {"seed": seed}
            make_job(tmp_path / f"{name}-{seed}", "finished", 1 + index + seed / 10, **made)
    for seed in (1, 2):
        file = tmp_path / f"added-{seed}" / "job.json"
        file.write_text(file.read_text().replace('"optimizer.alpha=0.9"', '"+optimizer.alpha=0.9"'))
        file = tmp_path / f"plain-{seed}" / "job.json"
        job = json.loads(file.read_text())
        del job["settings"]["optimizer.betas"]  # of an earlier version
        file.write_text(json.dumps(job))
    (study,) = studied(tmp_path)
    assert [len(group.entries) for group in study.groups] == [2, 2, 2, 2]
    assert study.keys == ["optimizer.alpha", "lora._target_", "callbacks.early_stopping._target_"]


def test_a_job_that_is_yet_to_go_on_counts_as_it_was_trained(tmp_path: Path) -> None:
    """The sweep was extended to four epochs, and stopped before it came to the second seed."""
    for seed in (1, 2):
        make_job(tmp_path / str(seed), "finished", 1 + seed / 10, trainer__max_epochs=4, seed=seed)
    config, command = tmp_path / "2" / "config.json", tmp_path / "2" / "command.json"
    config.write_text(config.read_text().replace('"max_epochs": 4', '"max_epochs": 2'))
    command.write_text(json.dumps(json.loads(command.read_text()) | {"overrides": ["trainer.max_epochs=2", "seed=2"]}))
    (study,) = studied(tmp_path)
    assert {group.name: list(group.values) for group in study.groups} == {"max_epochs 4": [1], "max_epochs 2": [2]}
    assert that_repeat(study.groups[1]) == ["python train.py trainer.max_epochs=2 seed=2"]


def test_a_run_alone_is_a_seed_of_the_setting_of_a_sweep(tmp_path: Path) -> None:
    """A job plans what is open; its run, and one that was typed alone, say what that came to."""
    for seed in (1, 2, 3):
        make_job(tmp_path / str(seed), "finished", 1 + seed / 10, monitor_mode=None, seed=seed)
        config = tmp_path / str(seed) / "config.json"
        config.write_text(config.read_text().replace('"monitor_mode": null', '"monitor_mode": "min"'))
    (tmp_path / "3" / "job.json").unlink()
    (study,) = studied(tmp_path)
    assert [(group.name, list(group.values)) for group in study.groups] == [("one setting", [1, 2, 3])]


def test_every_key_of_a_search_counts_though_all_differ_from_trial_to_trial(tmp_path: Path) -> None:
    for trial, (rate, decay) in enumerate([(1e-3, 0.3), (2e-3, 0.1), (4e-3, 0.2)]):
        for seed in (1, 2):
            swept = {"optimizer__lr": rate, "optimizer__weight_decay": decay, "seed": seed}
            make_job(tmp_path / f"trial_{trial}-seed_{seed}", "finished", rate, rows=8, **swept)
    (study,) = studied(tmp_path)
    assert study.keys == ["optimizer.lr", "optimizer.weight_decay"]
    titles = [picture.title for picture in pictures_of(study)]
    assert "val/loss by optimizer.weight_decay" in titles
    assert not any(" and " in title for title in titles), "a heat map of a diagonal says nothing"


def test_other_tasks_and_metrics_are_never_compared(tmp_path: Path) -> None:
    make(tmp_path / "a", {0.1: (1.5, 1.6)})
    make(tmp_path / "b", {0.1: (0.7, 0.8)}, task___target_="llm_lightning.tasks.classification.ClassificationModule")
    accuracy = {"monitor": "val/accuracy", "best_value": 0.9, "steps": 10, "total_steps": 10}
    make_job(tmp_path / "c", "finished", summary=accuracy, monitor="val/accuracy", monitor_mode="max")
    studies = studied(tmp_path)
    assert [(study.metric, study.mode, len(study.entries)) for study in studies] == [
        ("val/loss", "min", 2),
        ("val/loss", "min", 2),
        ("val/accuracy", "max", 1),
    ]
    assert not any(study.comparisons for study in studies)


def test_several_folders_are_compared_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    first, second = make(tmp_path / "adamw", {0.1: (1.5, 1.6, 1.4)}), make(tmp_path / "muon", {0.02: (1.2, 1.35)})
    (study,) = studied(first, second)
    assert study.keys == ["folder"], "the rate follows the folder"
    assert [(group.name, len(group.values)) for group in study.groups] == [("folder adamw", 3), ("folder muon", 2)]
    (one,) = study.comparisons
    assert (one.n, one.difference) == (2, pytest.approx(-0.275))
    assert one.p == pytest.approx(stats.ttest_rel([1.5, 1.6], [1.2, 1.35]).pvalue)


def test_another_metric(tmp_path: Path) -> None:
    make(tmp_path, {0.1: (1.5, 1.6), 0.01: (1.2, 1.3)})
    (study,) = studied(tmp_path, metric="val/accuracy")
    assert (study.mode, study.best and study.best.name) == ("max", "lr 0.01")
    for wrong, message in (
        ("test/accuracy", "the best is chosen by validation"),
        ("val/accuracies", "no run has it; there are"),
    ):
        with pytest.raises(ValueError, match=message):
            studied(tmp_path, metric=wrong)
