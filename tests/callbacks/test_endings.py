"""A run that a time limit or early stopping ended, and what goes on when the command is typed again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from tiny_run import SETTINGS, Outcome, assert_same, fit_here, write_corpus

from llm_lightning.callbacks.endings import stays_stopped
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints

STATE = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "task_module", "global_step", "position")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Four epochs of four updates, of three micro-batches each but the last."""
    settings = [word for word in SETTINGS if "max_steps" not in word and "samples" not in word]
    quiet = ["callbacks.samples=null", "callbacks.plots=null", "logger=csv"]
    corpus = write_corpus(tmp_path / "corpus.txt", 60)
    window = ["data.batch_size=2", "trainer.accumulate_grad_batches=3", "model.dropout=0.2", "trainer.max_epochs=4"]
    return [*settings, *quiet, *window, f"data.path={corpus}"]


def run(words: list[str], folder: Path, *more: str) -> Outcome:
    outcome = fit_here([*words, *more, f"hydra.run.dir={folder}"])
    assert outcome.code == 0, outcome.err
    return outcome


def run_until(n_looks: int, words: list[str], folder: Path) -> Outcome:
    """With a clock that runs out when it is looked at for the n-th time: once at the start, then at each batch."""
    looks = [0]

    def time_elapsed(self: Timer, stage: str = "train") -> float:
        looks[0] += stage == "train"
        return 1e6 if looks[0] > n_looks else 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timer, "time_elapsed", time_elapsed)
        return run(words, folder, "+trainer.max_time='00:01:00:00'")


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def make_old(folder: Path) -> None:
    """Leave what an earlier version left, which did not write down why a run ended."""
    summary = summary_of(folder)
    del summary["stopped_by"]
    (folder / "summary.json").write_text(json.dumps(summary | {"finished": True}))
    newest = checkpoints.newest_valid(folder / "checkpoints")
    assert newest is not None
    state = checkpoints.load(newest)
    del state["stopped_by"]
    checkpoints.save(newest, state)


@pytest.mark.slow
def test_a_time_limit_counts_from_each_start(words: list[str], tmp_path: Path) -> None:
    """And ends as the run without it, to the bit, wherever in an accumulation window the time was up."""
    run(words, tmp_path / "whole")
    steps = []
    for n_looks in (5, 2, 9):
        outcome = run_until(n_looks, words, tmp_path / "limited")
        summary = summary_of(tmp_path / "limited")
        steps.append(summary["steps"])
        assert (summary["finished"], summary["stopped_by"]) == (False, "time")
        said = f"Stopped by trainer.max_time after {summary['steps']} of {summary['total_steps']} steps, "
        assert said in outcome.out
        assert "the same command trains on" in outcome.out
    make_old(tmp_path / "limited")
    assert steps == [2, 3, 6]
    assert "Resuming from" in run(words, tmp_path / "limited", "+trainer.max_time='00:01:00:00'").out
    last = [checkpoints.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "limited")]
    for key in STATE:
        assert_same(last[0][key], last[1][key], key)
    curves = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "limited")]
    assert curves[0]["train/loss"] == curves[1]["train/loss"]
    assert "This run is finished: it ends at the first of" in run(words, tmp_path / "limited").out


@pytest.mark.parametrize("version", ["this", pytest.param("an earlier", marks=pytest.mark.slow)])
def test_a_run_that_stopped_early_goes_on_where_that_would_not_stop_it(
    words: list[str], tmp_path: Path, version: str
) -> None:
    folder, early = tmp_path / "run", ["callbacks=early_stopping", "callbacks.early_stopping.min_delta=100"]

    def epochs(*more: str) -> tuple[float, str]:
        out = run(words, folder, *early, *more).out
        found = summary_of(folder)["epochs"], out
        if version != "this" and "This run is finished" not in out:
            make_old(folder)
        return found

    assert epochs("callbacks.early_stopping.patience=1")[0] == 2
    n_epochs, out = epochs("callbacks.early_stopping.patience=1")
    assert n_epochs == 2
    assert "it was stopped early. To train on, raise callbacks.early_stopping.patience=1, or the lower of" in out
    n_epochs, out = epochs("callbacks.early_stopping.patience=2")
    assert n_epochs == 3
    assert "Stopped early after 12 of 16 steps" in out
    assert "This run is finished" in epochs("callbacks.early_stopping.patience=2")[1]
    early = ["callbacks.early_stopping=null"]
    assert epochs()[0] == 4
    assert "it ends at the first of" in epochs()[1]
    if version == "this":
        run(words, tmp_path / "whole")
        last = [checkpoints.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "run")]
        for key in STATE:
            assert_same(last[0][key], last[1][key], key)


def test_what_stopped_a_run_is_judged_by_what_is_set_now() -> None:
    def judged(options: dict[str, Any], reason: int, last: float, **now: Any) -> bool:
        before = EarlyStopping("val/loss", **options)
        state = before.state_dict() | {"stopping_reason": reason, "wait_count": before.patience}
        state["best_score"] = torch.tensor(1.0)
        header = {"metrics": {"val/loss": last}}
        checkpoint = {"callbacks": {before.state_key: state}, "stopped_by": "early_stopping", "llm_lightning": header}
        return stays_stopped(checkpoint, [Timer("00:00:00:01"), EarlyStopping("val/loss", **now)])

    assert judged({"patience": 2}, 3, 2.0, patience=2)
    assert judged({"patience": 2}, 3, 2.0, patience=1)
    assert not judged({"patience": 2}, 3, 2.0, patience=3)
    assert judged({"stopping_threshold": 0.5}, 1, 0.4, stopping_threshold=0.5)
    assert not judged({"stopping_threshold": 0.5}, 1, 0.4, stopping_threshold=0.3)
    assert judged({"divergence_threshold": 5.0}, 2, 6.0, divergence_threshold=5.0)
    assert not judged({"divergence_threshold": 5.0}, 2, 6.0, divergence_threshold=7.0)
    assert judged({}, 4, math.nan)
    assert not judged({}, 4, math.nan, check_finite=False)
    assert stays_stopped({"callbacks": {}, "stopped_by": "other"}, [])  # by a callback of the user's
    assert not stays_stopped({"callbacks": {}, "stopped_by": "time"}, [])
    assert stays_stopped({"callbacks": {}}, [])
    assert not stays_stopped({"callbacks": {"Timer": {}}}, [])
