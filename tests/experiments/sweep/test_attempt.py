"""How an attempt at a job ends: by itself, by its sweep, by its launcher, by a person, or requeued."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import jobs_are_forks
from tiny_run import SETTINGS, train_here, write_corpus

from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.sweep import attempt, claims, folder
from llm_lightning.experiments.sweep.children import Orders
from llm_lightning.experiments.sweep.launchers import remove_links, traits_of
from llm_lightning.experiments.sweep.stopping import requeueing, stop_signals

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize(
    ("code", "given", "outcome", "reason"),
    [
        (0, {"finished": True}, "finished", None),
        (0, {"stopped": True}, "stopped", None),
        (143, {"stopped": True}, "stopped", None),
        (255, {"stopped": True}, "stopped", None),
        (143, {}, "failed", "ended by SIGTERM"),
        (137, {}, "failed", "ended by SIGKILL"),
        (143, {"foreign": signal.SIGTERM}, "failed", "ended by SIGTERM of its launcher or of a person"),
        (0, {"foreign": signal.SIGTERM, "finished": True}, "finished", None),
        (3, {}, "failed", "ended with exit code 3, without a word why"),
    ],
)
def test_outcomes(code: int, given: dict[str, Any], outcome: str, reason: str | None, tmp_path: Path) -> None:
    if given.pop("finished", False):
        (tmp_path / "summary.json").write_text(json.dumps({"finished": True, "steps": 4, "total_steps": 4}))
    lines = ["the last line"]
    assert attempt.outcome_of(code, tmp_path, **{"stopped": False, **given}, lines=lines) == outcome
    failure = Failure.read(tmp_path)
    assert (failure is None) == (reason is None)
    if failure and reason:
        assert failure.message.startswith(reason)
        assert failure.lines == tuple(lines)
        assert failure.kind == ("error" if code == 3 else "signal")


def test_a_ctrl_c_that_reaches_the_child_first_is_the_sweeps(tmp_path: Path) -> None:
    answers = iter([False, True])
    assert attempt.outcome_of(130, tmp_path, stopped=False, over=lambda: next(answers)) == "stopped"


def test_a_job_knows_when_its_sweep_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = folder.begin(tmp_path)
    monkeypatch.setattr(folder, "SILENT_SECONDS", 0.0)
    watch = folder.Watch(sweep)
    time.sleep(0.01)
    assert not watch.is_over()  # on this host, its process says that it lives
    (tmp_path / folder.SWEEP).rename(tmp_path / "hidden")
    assert not watch.is_over()  # by a slow file system
    (tmp_path / "hidden").rename(tmp_path / folder.SWEEP)
    again = folder.begin(tmp_path)
    assert watch.is_over()
    watch = folder.Watch(again)
    assert not watch.is_over()
    folder.end(again)
    assert watch.is_over()


def test_a_sweep_that_died_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = FORK.Process(target=folder.begin, args=(tmp_path,))
    parent.start()
    parent.join()
    state = json.loads((tmp_path / folder.SWEEP).read_text())
    head = folder.Process(state["pid"], state["host"], state["process_start"])
    assert folder.Watch(folder.SweepRef(str(tmp_path), state["id"], head)).is_over()
    elsewhere = folder.SweepRef(str(tmp_path), state["id"], folder.Process(1, "another-host", "1"))
    watch = folder.Watch(elsewhere)
    assert not watch.is_over()
    monkeypatch.setattr(folder, "SILENT_SECONDS", 0.0)
    assert watch.is_over()


def test_submitit_requeues_only_after_the_job_has_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    def submitit(signum: int, _: Any) -> None:
        did.append("requeued")
        sys.exit(-1)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    before = signal.signal(signal.SIGUSR2, submitit)
    try:
        with requeueing() as requeue:
            assert requeue is not None
            assert not requeue.is_due([])
            os.kill(os.getpid(), signal.SIGUSR2)
            assert requeue.is_due([])
            did.append("saved")
            with pytest.raises(SystemExit):
                requeue()
        assert did == ["saved", "requeued"]
        assert signal.getsignal(signal.SIGUSR2) is submitit
        monkeypatch.delenv("SUBMITIT_EXECUTOR")
        with requeueing() as requeue:
            assert requeue is None
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_signals_are_collected_and_a_second_ctrl_c_ends_at_once() -> None:
    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with stop_signals() as received, stop_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert received == inner == [signal.SIGTERM, signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(1)

    process = FORK.Process(target=interrupted)
    process.start()
    process.join(timeout=30)
    assert process.exitcode == -signal.SIGINT


def test_each_launcher_gives_a_job_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(claims.VISIBLE, "0,1")
    basic = traits_of({"_target_": "x.BasicLauncher"}, 6, 1)
    assert (basic.in_this_process, basic.share.threads, basic.share.gpus) == (True, None, ("0", "1"))
    joblib = traits_of({"_target_": "x.JoblibLauncher", "n_jobs": 4}, 6, 2)
    assert (joblib.workers, joblib.share.threads, joblib.share.forks, joblib.share.jobs_per_gpu) == (4, 2, True, 2)
    assert traits_of({"_target_": "x.JoblibLauncher", "n_jobs": -1}, 3, 1).workers == 3
    local = traits_of({"_target_": "x.LocalLauncher", "cpus_per_task": 4}, 6, 1)
    assert (local.at_a_time, local.share.threads, local.share.forks) == (2, 4, False)
    slurm = traits_of({"_target_": "x.SlurmLauncher"}, 6, 1)
    assert (slurm.share.gpus, slurm.share.threads, slurm.share.forks) == ((), None, False)


def test_only_submitits_own_links_are_removed(tmp_path: Path) -> None:
    submitit = tmp_path / ".submitit"
    submitit.mkdir()
    for name in (".submission_file_1a.sh", "other.sh"):
        (submitit / name).symlink_to(tmp_path / "12" / "12_submission.sh")
    (submitit / ".submission_file_2b.sh").write_text("")
    remove_links(tmp_path)
    assert sorted(path.name for path in submitit.iterdir()) == [".submission_file_2b.sh", "other.sh"]


@pytest.mark.slow
def test_a_job_of_any_launcher_claims_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(claims.VISIBLE, "0,1,2")
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    jobs_are_forks(monkeypatch)
    starts, seen = attempt.start_child, list[str]()

    def start_child(orders: Orders, *output: Any) -> Any:
        seen.append(orders.environment[claims.VISIBLE])
        return starts(orders, *output)

    monkeypatch.setattr(attempt, "start_child", start_child)
    words = ["-m", *SETTINGS, f"data.path={write_corpus(tmp_path / 'corpus.txt', 60)}", "accelerator=auto"]
    with claims.claimed(claims.machine_folder(tmp_path / "cache"), ["0"], 1):  # of another sweep
        outcome = train_here([*words, "run_name=study", "seed=1"])
        refused = train_here([*words, "run_name=study", "trainer.devices=4", "seed=2"])
    assert outcome.code == 0, outcome.err
    assert seen == ["1"]
    assert refused.code != 0
    assert "trainer.devices=4 asks for more GPUs than this machine shows (3)" in refused.err
