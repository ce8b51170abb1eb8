"""What a sweep runs again, and what it leaves: jobs are found by what they are, and fail in classes."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import pytest
from forked import jobs_are_forks
from tiny_run import SETTINGS, train_here, write_corpus

from llm_lightning.experiments.report.watching import SweepReport
from llm_lightning.experiments.run_folder import process_start
from llm_lightning.experiments.sweep.runner import Runner

WRITE_REPORT = SweepReport.write
SWEPT = ["-m", "optimizer.lr=0.001,0.002", "run_name=study"]


class Typed:
    """Sweeps that are typed one after the other in one folder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        patch.chdir(folder)
        self.folder = folder / "outputs" / "sweeps" / "study"
        self.corpus = write_corpus(folder / "corpus.txt", 60)
        self.started = jobs_are_forks(patch)
        self.code, self.out, self.err = 0, "", ""

    def __call__(self, *words: str) -> list[str]:
        """Run a sweep; the names of the jobs that were started."""
        before = len(self.started)
        data = [] if any(word.startswith("data.path") for word in words) else [f"data.path={self.corpus}"]
        self.code, self.out, self.err = train_here([*SETTINGS, *data, *(words or SWEPT)])
        folders = [words[-1].removeprefix("hydra.run.dir=").strip("'") for words in self.started[before:]]
        return [Path(folder).name for folder in folders]

    def steps(self, job: str) -> int:
        return int(json.loads((self.folder / job / "summary.json").read_text())["steps"])


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return Typed(tmp_path, monkeypatch)


@pytest.mark.slow
def test_what_is_finished_is_found_by_what_it_is_whatever_it_is_called(typed: Typed) -> None:
    assert typed() == ["lr_0.001", "lr_0.002"]
    assert typed.code == 0, typed.err
    (typed.folder / "lr_0.001" / "job.json").unlink()
    assert typed() == []
    typed.corpus = typed.corpus.rename(typed.corpus.with_name("elsewhere.txt"))
    (typed.folder / "lr_0.002").rename(typed.folder / "the_second")
    assert typed() == []
    more = ["-m", "run_name=study", "seed=1,1234", "optimizer.lr=0.0015,0.002,0.001"]
    assert typed(*more) == [
        "seed_1-lr_0.0015",
        "seed_1-lr_0.002",
        "seed_1-lr_0.001",
        "seed_1234-lr_0.0015",
    ]
    assert typed(*more) == []
    shutil.rmtree(typed.folder / "the_second")
    assert typed() == ["lr_0.002"]
    typed.folder.rename(typed.folder.with_name("moved"))
    assert typed(*SWEPT[:2], "run_name=moved") == []


@pytest.mark.slow
def test_another_setting_of_all_jobs_makes_other_jobs_beside_them(typed: Typed) -> None:
    typed()
    first, second = typed(*SWEPT, "model.dropout=0.5")
    assert first.startswith("lr_0.001-")
    assert second.startswith("lr_0.002-")
    assert typed(*SWEPT, "model.dropout=0.5") == []
    assert typed() == []


@pytest.mark.slow
def test_a_higher_limit_lets_finished_jobs_go_on(typed: Typed) -> None:
    typed()
    assert typed(*SWEPT, "trainer.max_steps=6") == ["lr_0.001", "lr_0.002"]
    assert (typed.steps("lr_0.001"), typed.steps("lr_0.002")) == (6, 6)
    assert typed(*SWEPT, "trainer.max_steps=6") == []


@pytest.mark.slow
def test_the_same_job_twice_runs_once(typed: Typed) -> None:
    assert typed("-m", "optimizer.lr=0.002,2e-3,0.0020", "run_name=study") == ["lr_0.002"]
    assert "1 job, 1 to run" in typed.out


@pytest.mark.slow
def test_what_failed_of_itself_runs_again_only_when_asked(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", "optimizer.lr=0.001,1e30", "run_name=study"]
    with monkeypatch.context() as patch:
        patch.setattr(SweepReport, "write", WRITE_REPORT)
        assert typed(*words) == ["lr_0.001", "lr_1e30"]
    assert typed.code == 2
    assert "Report: outputs/sweeps/study/report.html" in typed.out
    assert "| lr\\_1e30 | failed | non-finite loss" in (typed.folder / "report.md").read_text()
    assert "lr_1e30" in typed.out
    assert "non-finite loss" in typed.out
    assert "1 of 2 jobs failed" in typed.err
    assert typed.err.rstrip().endswith("hydra.sweeper.retry_failed=true")
    failure = json.loads((typed.folder / "lr_1e30" / "failure.json").read_text())
    assert failure["kind"] == "error"
    assert typed(*words) == []
    assert typed.code == 2, "it is still a sweep with a failed job"
    assert "1 finished, 1 failed before, 0 to run" in typed.out
    assert typed(*words, "hydra.sweeper.retry_failed=true") == ["lr_1e30"]


@pytest.mark.slow
def test_a_sweep_that_is_stopped_or_fails_leaves_a_report(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepReport, "write", WRITE_REPORT)

    def stop(runner: Runner, todo: object, ref: object, received: list[int]) -> None:
        received.append(15)

    monkeypatch.setattr(Runner, "launch", stop)
    assert typed() == []
    assert typed.code == 143
    assert "2 jobs: 2 waiting" in (typed.folder / "report.md").read_text()
    (typed.folder / "report.md").unlink()

    def fail(*_: object) -> None:
        raise ValueError("no launcher")

    monkeypatch.setattr(Runner, "launch", fail)
    typed()
    assert typed.code == 2
    assert "2 jobs: 2 waiting" in (typed.folder / "report.md").read_text()


@pytest.mark.slow
def test_what_failed_through_the_system_runs_again(typed: Typed) -> None:
    missing = typed.folder.parents[2] / "missing.txt"
    words = ["-m", "seed=1,2", "run_name=study", f"data.path={missing}"]
    assert typed(*words) == ["seed_1", "seed_2"]
    assert "retry_failed" not in typed.err
    assert typed(*words) == ["seed_1", "seed_2"]
    missing.write_text(typed.corpus.read_text())
    assert typed(*words) == ["seed_1", "seed_2"]
    assert typed.code == 0, typed.err
    assert not (typed.folder / "seed_1" / "failure.json").exists()


@pytest.mark.slow
def test_a_job_that_a_signal_ended_runs_again(typed: Typed) -> None:
    killer = ["allow_targets=[suicidal]", "+callbacks.killer._target_=suicidal.Suicidal"]
    folder = typed.folder.parents[2]
    (folder / "suicidal.py").write_text(
        "import os, signal\nimport lightning as L\n\n\nclass Suicidal(L.Callback):\n"
        "    def on_train_start(self, *_):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        assert typed(*SWEPT, *killer) == ["lr_0.001", "lr_0.002"]
        assert "ended by SIGKILL" in typed.out
        failure = json.loads((typed.folder / "lr_0.001" / "failure.json").read_text())
        assert (failure["kind"], failure["exit_code"]) == ("signal", 137)
        assert any("Model:" in line for line in failure["lines"]), "the last lines of its log"
        assert typed(*SWEPT, *killer) == ["lr_0.001", "lr_0.002"]


@pytest.mark.slow
def test_a_damaged_job_is_named_before_the_first_job(typed: Typed) -> None:
    typed()
    for file in ("job.json", "summary.json"):
        content = (typed.folder / "lr_0.002" / file).read_text()
        (typed.folder / "lr_0.002" / file).write_text("{")
        assert typed("-m", "optimizer.lr=0.002,0.003", "run_name=study") == []
        assert typed.code == 2
        assert typed.err.count("\n") == 1
        assert str(typed.folder / "lr_0.002" / file) in typed.err
        (typed.folder / "lr_0.002" / file).write_text(content)


def test_a_sweep_that_is_running_elsewhere_is_refused_by_name(typed: Typed) -> None:
    typed.folder.mkdir(parents=True)
    owner = {
        "pid": os.getppid(),
        "host": platform.node(),
        "process_start": process_start(os.getppid()),
        "started": "then",
        "command": [],
    }
    (typed.folder / "owner.json").write_text(json.dumps(owner))
    assert typed() == []
    assert (typed.code, typed.err.count("\n")) == (2, 1)
    assert f"sweep folder {typed.folder} is in use by process {os.getppid()}" in typed.err


def test_a_wrong_job_stops_the_sweep_before_the_first(typed: Typed) -> None:
    assert typed("-m", "optimizer.lr=0.001,fast", "run_name=study") == []
    assert "optimizer.lr='fast' must be a number" in typed.err
    assert (typed.code, typed.err.count("\n")) == (2, 1)
    assert not typed.folder.exists()


def test_settings_of_a_sweep_that_no_job_would_get_are_refused(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    file = tmp_path / "mine" / "sweep" / "mine.yaml"
    file.write_text("# @package _global_\nhydra:\n  mode: MULTIRUN\noptimizer:\n  lr: 1\n")
    typed(f"--config-dir={tmp_path / 'mine'}", "sweep=mine", "seed=1,2")
    assert f"optimizer in {file} would reach no job: write it under hydra.sweeper.params" in typed.err
    assert typed.code == 2


@pytest.mark.slow
def test_a_typed_folder_is_the_one_to_add_jobs_to_and_jobs_have_no_typed_folder(typed: Typed, tmp_path: Path) -> None:
    typed("-m", "seed=1", f"hydra.sweep.dir={tmp_path / 'mine'}")
    assert "type more values with hydra.sweep.dir=mine" in typed.out
    typed("-m", "seed=1,2", "hydra.sweep.subdir=sub")
    assert (typed.code, typed.err.count("\n")) == (2, 1)
    assert "hydra.sweep.subdir has no effect" in typed.err


@pytest.mark.slow
def test_another_sweeper_runs_the_jobs_as_well(typed: Typed) -> None:
    assert typed(*SWEPT, "hydra/sweeper=basic") == ["0", "1"]
    assert typed.code == 0, typed.err
    assert typed.steps("1") == 4
