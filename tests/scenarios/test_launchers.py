"""Sweeps by launchers with processes of their own: what fails, is killed or stopped ends as in serial, and goes on.

The same test runs on a real SLURM where `sinfo` answers; tests/slurm/cluster.py starts one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sweep import all_gone
from tiny_run import ROOT, SETTINGS, assert_same, write_corpus

STUDY = """# @package _global_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      data.path: {folder}/corpus.txt
      allow_targets: [faulty]
      +callbacks.slow._target_: faulty.Slow
      +callbacks.slow.path: {folder}/slow
      callbacks.checkpoints.every_n_steps: 3
      trainer.max_steps: 24
    jobs:
      one: {{seed: 1}}
      two: {{seed: 2}}
      missing: {{data.path: {folder}/missing.txt}}
      three: {{seed: 3}}
      four: {{seed: 4}}
      five: {{seed: 5}}
"""
JOBS = ("one", "two", "missing", "three", "four", "five")


def has_slurm() -> bool:
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True, timeout=30, check=False).returncode == 0


def launcher(name: str, *more: str, where: Any = ()) -> Any:
    return pytest.param([f"hydra/launcher={name}", *more], id=name, marks=where)


needs_slurm = pytest.mark.skipif(not has_slurm(), reason="no SLURM: tests/slurm/cluster.py starts one")
needs_plugins = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None
    or importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="the extra sweep is not installed",
)
JOBLIB = ("joblib", "hydra.launcher.n_jobs=2")
LAUNCHERS = [
    launcher(*JOBLIB, where=pytest.mark.slow),
    launcher("submitit_local", where=pytest.mark.soak),
    launcher("submitit_slurm", where=(pytest.mark.slow, needs_slurm)),
]


class Study:
    """One sweep of six jobs, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sweep = folder / "outputs" / "sweeps" / "study"
        write_corpus(folder / "corpus.txt")
        (folder / "conf" / "sweep").mkdir(parents=True)
        (folder / "conf" / "sweep" / "study.yaml").write_text(STUDY.format(folder=folder))
        own = [word for word in SETTINGS if not word.startswith("trainer.max_steps")]
        self.words = [f"--config-dir={folder / 'conf'}", *own, "sweep=study", "run_name=study"]
        self.slow = folder / "slow"
        self.starts = 0

    def start(self, *more: str) -> subprocess.Popen[str]:
        self.starts += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
        command = [sys.executable, str(ROOT / "train.py"), *self.words, *more]
        options: dict[str, Any] = {"cwd": self.folder, "env": environment, "start_new_session": True, "text": True}
        with (self.folder / f"{self.starts}.log").open("w") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, **options)

    def said(self) -> str:
        return (self.folder / f"{self.starts}.log").read_text()

    def read(self, job: str, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.sweep / job / name).read_text())  # type: ignore[no-any-return]
        except FileNotFoundError:
            return {}

    def until(self, holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def trains(self, job: str) -> bool:
        """Whether a job of this start is among its steps."""
        if self.read(job, "attempt.json").get("state") != "running":
            return False
        metrics = self.sweep / job / "metrics.csv"
        owner = self.read(job, "owner.json")
        return bool(owner) and metrics.is_file() and metrics.stat().st_size > 0

    def states(self) -> list[str | None]:
        return [self.read(job, "attempt.json").get("state") for job in JOBS]

    def checkpoint(self, job: str) -> Any:
        """Weights and optimizer of the last checkpoint."""
        content = torch.load(self.sweep / job / "checkpoints" / "last.ckpt", weights_only=True)
        return [content["state_dict"], content["optimizer_states"]]


def blocks(pid: int, signum: int) -> bool:
    """Whether a process holds a signal back."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = re.search(r"SigBlk:\s*(\w+)", status)
    assert mask is not None
    return bool(int(mask[1], 16) >> (signum - 1) & 1)


def is_left(process: subprocess.Popen[str], words: list[str]) -> bool:
    """Whether a process of a sweep that has ended is left after 15 s, or a job of it in SLURM's queue."""
    if not any("slurm" in word for word in words):
        return not all_gone(process.pid, 15)
    deadline = time.monotonic() + 15
    command = ["squeue", "--noheader", "--states=RUNNING,PENDING"]
    while (queue := subprocess.run(command, capture_output=True, text=True, check=True).stdout) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.5)
    return bool(queue)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tmp_path_factory.mktemp("serial"))
    assert study.start("hydra.sweeper.only=[one]").wait(timeout=300) == 0, study.said()
    return study


@needs_plugins
@pytest.mark.parametrize("words", LAUNCHERS)
def test_stopped_killed_and_continued(words: list[str], tmp_path: Path, undisturbed: Study) -> None:
    study = Study(tmp_path)
    study.slow.touch()

    process = study.start(*words)
    study.until(lambda: study.trains("one") and study.trains("two"), process)
    process.terminate()
    assert process.wait(timeout=60) == 143, study.said()
    assert not is_left(process, words)
    assert study.states()[:2] == ["stopped", "stopped"]
    assert "Sweep study: stopped, 6 jobs left; the same command continues" in study.said()
    assert all((study.sweep / job / "checkpoints" / "last.ckpt").exists() for job in ("one", "two"))

    process = study.start(*words)
    study.until(lambda: study.trains("two"), process)
    trainer = study.read("two", "owner.json")["pid"]
    assert blocks(trainer, signal.SIGUSR2), "SLURM sends it to all processes of a job"
    assert not blocks(trainer, signal.SIGINT)
    os.kill(trainer, signal.SIGKILL)
    study.until(lambda: study.read("two", "attempt.json").get("state") != "running", process)
    study.slow.unlink()
    assert process.wait(timeout=300) == 2, study.said()
    assert not is_left(process, words)
    assert study.states() == ["finished", "failed", "failed", "finished", "finished", "finished"]
    assert study.read("two", "failure.json") | {"ended": "", "lines": []} == {
        "kind": "signal",
        "exception": None,
        "message": "ended by SIGKILL",
        "exit_code": 137,
        "ended": "",
        "lines": [],
        "began": True,
    }
    assert study.read("missing", "failure.json")["kind"] == "os"
    assert re.search(r"^error: 2 of 6 jobs failed; .* run only them: ", study.said(), re.MULTILINE)
    assert re.search(r"^Sweep study: five finished \(\d of 6\)$", study.said(), re.MULTILINE)

    assert_same(study.checkpoint("one"), undisturbed.checkpoint("one"))


@pytest.mark.soak
@needs_plugins
def test_a_killed_worker_of_joblib_loses_no_job(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.slow.touch()
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.only=[one,two,three]"]
    process = study.start(*words)
    study.until(lambda: study.trains("one") and study.trains("two"), process)
    os.kill(study.read("two", "attempt.json")["pid"], signal.SIGKILL)
    study.until(lambda: "two was lost by the launcher, and runs again alone" in study.said(), process)
    study.slow.unlink()
    assert process.wait(timeout=300) == 0, study.said()
    assert not is_left(process, words)
    assert [study.read(job, "attempt.json")["state"] for job in ("one", "two", "three")] == ["finished"] * 3


@pytest.mark.soak
@needs_plugins
@pytest.mark.parametrize("words", [launcher(*JOBLIB), launcher("submitit_local")])
def test_a_killed_sweep_leaves_nothing_and_a_second_ctrl_c_ends_at_once(words: list[str], tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.slow.touch()
    process = study.start(*words)
    study.until(lambda: study.trains("one") and study.trains("two"), process)
    process.kill()
    process.wait()
    assert not is_left(process, words)
    assert study.states()[:2] == ["stopped", "stopped"]

    process = study.start(*words)
    study.until(lambda: study.trains("one") and study.trains("two"), process)
    os.killpg(process.pid, signal.SIGINT)
    # Two signals at once can reach a busy process as one.
    study.until(lambda: study.read("", "sweep.json")["state"] == "ended", process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=15) == -signal.SIGINT, study.said()  # 130: it waited for its jobs
    assert not is_left(process, words)


@pytest.mark.soak
@needs_plugins
def test_the_end_of_a_jobs_time_lets_it_save_and_go_on(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.slow.touch()
    process = study.start("hydra/launcher=submitit_local", "hydra.sweeper.only=[one]")
    study.until(lambda: study.trains("one"), process)
    os.kill(study.read("one", "attempt.json")["pid"], signal.SIGUSR2)  # as SLURM's and submitit's own timers do
    study.until(lambda: "one is requeued" in study.said(), process)
    study.slow.unlink()
    assert process.wait(timeout=300) == 0, study.said()
    assert study.states()[0] == "finished"
    assert json.loads((study.sweep / "one" / "summary.json").read_text())["steps"] == 24
