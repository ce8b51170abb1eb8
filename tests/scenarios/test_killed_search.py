"""A search that is killed: the suggestions, prunings and best value of the one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from test_sweep import all_gone
from tiny_run import ROOT, SETTINGS, write_corpus

TRIALS = 30
WORDS = [
    *(word for word in SETTINGS if not word.startswith(("trainer.max_steps", "model.n_embd", "callbacks.samples"))),
    "callbacks.samples=null",
    "callbacks.checkpoints.every_n_steps=15",
    "model.n_embd=32",
    "trainer.max_steps=60",
    "trainer.val_check_interval=5",
    "-m",
    "hydra/sweeper=optuna",
    "hydra.sweeper.pruner=median",
    "hydra.sweeper.seeds=2",
    "optimizer.lr=tag(log, interval(1e-5, 1e-1))",
    "model.dropout=interval(0, 0.5)",
    "data.batch_size=8,16",
    "run_name=study",
]


class Search:
    """The same search, typed in folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, write_corpus(folder / "corpus.txt", 2000)

    def start(self, place: str, *more: str) -> subprocess.Popen[str]:
        (self.folder / place).mkdir(exist_ok=True)
        command = [sys.executable, str(ROOT / "train.py"), *WORDS, f"data.path={self.corpus}", *more]
        with (self.folder / f"{place}.log").open("a") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder / place,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )

    def said(self, place: str) -> str:
        return (self.folder / f"{place}.log").read_text()

    def journal(self, place: str) -> Path:
        return self.folder / place / "outputs" / "sweeps" / "study" / "study.journal"

    def trials(self, place: str) -> list[dict[str, Any]]:
        """What Optuna reads in the journal, without the times."""
        study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(self.journal(place)))))
        return [
            {name: getattr(trial, name) for name in ("number", "state", "params", "values", "intermediate_values")}
            | {"jobs": trial.user_attrs.get("jobs"), "reason": trial.user_attrs.get("reason")}
            for trial in study.trials
        ]


def kill(search: Search, moments: random.Random, n_lines: int, *, group: bool) -> None:
    """Start the search, and kill it once its journal has so many lines, alone or with all that it started."""
    process = search.start("killed", f"hydra.sweeper.n_trials={TRIALS}")
    deadline = time.monotonic() + 600
    journal = search.journal("killed")
    while not journal.exists() or journal.read_bytes().count(b"\n") < n_lines:
        assert process.poll() is None, search.said("killed")
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(moments.choice([0, moments.uniform(0, 3)]))
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.soak
def test_a_killed_search_is_the_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    search = Search(tmp_path)
    whole = search.start("whole", f"hydra.sweeper.n_trials={TRIALS}")
    assert whole.wait(timeout=1800) == 0, search.said("whole")
    undisturbed = search.trials("whole")
    assert len(undisturbed) == TRIALS
    states = [trial["state"] for trial in undisturbed]
    assert states.count(TrialState.PRUNED) >= 3
    assert states.count(TrialState.COMPLETE) >= 10
    n_jobs = len(list(search.journal("whole").parent.glob("trial_*")))
    assert n_jobs < 2 * TRIALS, "a seed may end a trial"

    moments = random.Random(1)
    n_lines = search.journal("whole").read_bytes().count(b"\n")
    for number in range(5):
        kill(search, moments, (2 * number + 1) * n_lines // 10, group=number % 2 == 0)
    last = search.start("killed", f"hydra.sweeper.n_trials={TRIALS}")
    assert last.wait(timeout=1800) == 0, search.said("killed")
    assert search.trials("killed") == undisturbed
    assert search.journal("killed").parent.joinpath("trial_29-seed_1234").is_dir()
    best = "Best: trial"
    assert (
        search.said("killed").rpartition(best)[2].splitlines()[0]
        == search.said("whole").rpartition(best)[2].splitlines()[0]
    )

    again = search.start("killed", f"hydra.sweeper.n_trials={TRIALS + 1}")
    assert again.wait(timeout=300) == 0
    assert search.trials("killed")[:TRIALS] == undisturbed
    assert len(search.trials("killed")) == TRIALS + 1
    assert all_gone(again.pid)
