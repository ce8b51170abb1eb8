"""Pretraining runs on a mixture, with validation and test text of its own: what is logged, reported and resumed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tiny_run import SETTINGS, assert_same, fit_here

from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints

SIZES = {"web": 6000, "books": 1500, "code": 300}
WEIGHTS = (0.7, 0.2, 0.1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts of three sources, and two to measure."""
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    for number, (name, size) in enumerate({**SIZES, "news": 400, "val": 700, "test": 500}.items()):
        (tmp_path / f"{name}.txt").write_text("".join(random.Random(number).choices("abcd efg.", k=size)))
    return tmp_path


def mixture(folder: Path) -> str:
    sources = [f"{{name: {n}, path: {folder}/{n}.txt, weight: {w}}}" for n, w in zip(SIZES, WEIGHTS, strict=True)]
    return f"data.mixture=[{', '.join(sources)}]"


def words(folder: Path, name: str, *more: str) -> list[str]:
    return [*SETTINGS, "data.batch_size=4", f"hydra.run.dir={folder / name}", *more]


@pytest.mark.slow
def test_a_whole_run(folder: Path) -> None:
    measured = [f"data.val_path={folder}/val.txt", f"data.test_path={folder}/test.txt"]
    measured += [f"data.val_sets={{news: {folder}/news.txt}}", "monitor=val/news/loss"]
    epoch = ["trainer.max_steps=-1", "trainer.max_epochs=1"]
    outcome = fit_here(words(folder, "run", mixture(folder), *measured, *epoch))
    assert outcome.code == 0, outcome.err
    metrics = read_metrics(folder / "run" / "metrics.csv")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    n_windows = 375 + 94 + 19  # ceil(5999 / 16) and so on: the last one is shorter
    per_epoch = {name: facts["per_epoch"] for name, facts in summary["data"]["mixture"].items()}
    assert sum(per_epoch.values()) == n_windows
    for (name, count), weight in zip(per_epoch.items(), WEIGHTS, strict=True):
        assert abs(count / n_windows - weight) < 0.01
        assert [value for _, value in metrics[f"mixture/{name}"]] == [count]
    assert summary["steps"] == n_windows // 4
    assert "code: 10.0% of an epoch, 49 of 488 windows; it has 19, each of which comes 2.6 times" in outcome.out
    assert {"val/loss", "val/news/loss", "val/news/bits_per_byte", "train/eval_loss", "test/loss"} <= metrics.keys()
    assert summary["best_value"] == pytest.approx(min(value for _, value in metrics["val/news/loss"]), rel=1e-6)
    assert summary["data"]["leaks"] == {stage: {"documents": 0, "of": 1} for stage in ("val", "test", "val/news")}
    assert "Test loss of the best checkpoint" in outcome.out


@pytest.mark.slow
def test_further_validation_sets_change_nothing_else(folder: Path) -> None:
    plain = [f"data.path={folder}/web.txt", "trainer.val_check_interval=2"]
    with_sets = [*plain, f"data.val_sets={{news: {folder}/news.txt}}"]
    for name, arguments in (("plain", plain), ("sets", with_sets)):
        assert fit_here(words(folder, name, *arguments)).code == 0
    found = [read_metrics(folder / name / "metrics.csv") for name in ("plain", "sets")]
    assert set(found[1]) - set(found[0]) == {f"val/news/{name}" for name in ("loss", "perplexity", "bits_per_byte")}
    for name in ("val/loss", "train/loss", "train/eval_loss"):
        assert found[0][name] == found[1][name]
    states = [checkpoints.load(folder / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("plain", "sets")]
    assert_same(*states)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 30, 110, 150])
def test_a_run_that_is_extended_ends_as_one_that_was_not(folder: Path, stop: int) -> None:
    """110 steps are an epoch: the second one begins where the long source stopped."""
    common = ["trainer.max_epochs=2", "scheduler=constant", mixture(folder)]
    assert fit_here(words(folder, "whole", *common, "trainer.max_steps=170")).code == 0
    for steps in (stop, 170):
        assert fit_here(words(folder, "parts", *common, f"trainer.max_steps={steps}")).code == 0
    one, other = (checkpoints.load(folder / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts"))
    assert_same(one["state_dict"], other["state_dict"])
    logs = [read_metrics(folder / name / "metrics.csv") for name in ("whole", "parts")]
    rows = [dict(log["mixture/web"]) for log in logs]
    assert list(rows[0]) == [109, 169]
    assert rows[0].items() <= rows[1].items()  # the first part ended with a row, too
